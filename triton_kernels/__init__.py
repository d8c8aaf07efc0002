"""Triton kernels of the ops, for GPUs where the CUDA library was not built."""
