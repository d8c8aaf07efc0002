"""Microbenchmarks and a small language model, one command: ``python -m bench``."""
