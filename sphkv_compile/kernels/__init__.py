"""Kernels: the code that is fast, one folder per kind of device."""
