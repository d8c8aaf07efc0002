"""The benchmark of the CPU kernels: ``python -m bench``."""
