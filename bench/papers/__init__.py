"""The experiments of both papers: ``python -m bench papers``."""

PARTS = ("cost", "copying", "characters", "control", "states")
# On pretrained models; hours together, so that they run only where they are named.
REAL = (
    "real-stock",
    "real-perplexity",
    "real-scopes",
    "real-gemma",
    "real-why",
    "real-attention",
    "real-prompt",
    "real-retrieval",
    "real-keys",
    "real-writing",
    "real-throughput",
    "real-minrnns",
)
