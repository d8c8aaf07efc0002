"""Looking up one of several pass keys."""

from __future__ import annotations

from functools import partial

from bench.papers.real import retrieval

run = partial(retrieval.measure, ("four",), False)
section = retrieval.section
