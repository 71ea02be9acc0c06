"""Triton kernels: the decode step over tiled pages, for CUDA."""
