"""The fused decode kernel of a CPU: ``decode.cpp``, and ``binding`` that builds and calls it."""
