"""Requests behind vLLM, with a bounded state and without."""
