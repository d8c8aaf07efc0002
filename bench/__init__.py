"""Benchmarks and experiments, one command: ``python -m bench --help``."""
