"""Looking up one of several pass keys."""

from __future__ import annotations

from functools import partial

from bench.papers.real import retrieval

# Prompts twice as long would take as long as all others.
run = partial(retrieval.measure, ("four",), retrieval.LENGTHS[:-1], False)
section = retrieval.section
