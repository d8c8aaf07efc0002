"""The experiments of both papers: ``python -m bench papers``."""

PARTS = ("cost", "copying", "characters", "control", "states")
