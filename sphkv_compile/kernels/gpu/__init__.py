"""Triton kernels for CUDA: the decode step, bulk encode and a prefill's attention over tiled pages."""
