"""The benchmark of the CUDA and Triton kernels: ``python -m bench cuda``."""
