"""Perplexity once more: what a decision of each head, and kept first tokens, change."""

from __future__ import annotations

from functools import partial

from bench.papers.real import perplexity, perplexity_report

STORE = "real-perplexity"  # the same texts: the full state and TOVA-layer are measured there
_USUAL = perplexity.Grid(
    "smollm2",
    ("TOVA-layer", "TOVA-layer+4", "TOVA-head", "TOVA-head+4", "H2O-head"),
    (2048, 4096),
    (64, 256, 1024),
    12,
)
run = partial(perplexity.measure, _USUAL)
section = perplexity_report.section
