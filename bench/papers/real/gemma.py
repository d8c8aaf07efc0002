"""Perplexity of another model, of whose layers only every sixth attends to all tokens."""

from __future__ import annotations

from functools import partial

from bench.papers.real import perplexity, perplexity_report

# One key-value head: a decision of each head is the layer's.
_POLICIES = ("TOVA-layer", "TOVA-layer, half recent", "H2O-layer", "Window+4", "Window")
_USUAL = perplexity.Grid("gemma3", _POLICIES, (2048,), (32, 128, 512), 12)
run = partial(perplexity.measure, _USUAL)
section = perplexity_report.section
