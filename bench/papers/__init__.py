"""The experiments of the two papers, at home: ``python -m bench.papers``."""
