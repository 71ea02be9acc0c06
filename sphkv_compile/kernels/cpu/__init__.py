"""The fused kernels of a CPU, in C++; ``binding`` builds and calls them, ``decode.cpp`` is the one to read first."""
