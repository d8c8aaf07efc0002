"""Perplexities and how sure their differences are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from bench.table import number, say

_RESAMPLES = 10_000


def perplexity(losses: Sequence[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def say_perplexity(label: str, losses: Sequence[float]) -> None:
    say(f"{label}: perplexity {number(perplexity(losses), 4)}")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How much higher the perplexity `theirs` is than `ours`, as a share, and a 95 % interval.

    The interval is of a paired bootstrap: excerpts are drawn again, each with both of its losses.
    """
    apart = [y - x for x, y in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    means = sorted(sum(draw.choices(apart, k=len(apart))) / len(apart) for _ in range(_RESAMPLES))
    low, high = means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
    return math.expm1(sum(apart) / len(apart)), math.expm1(low), math.expm1(high)


def percent(x: tuple[float, float, float]) -> str:
    """A difference and its interval."""
    middle, low, high = (f"{100 * one:+.1f}" for one in x)
    return f"{middle} ({low} to {high})"
