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
    middle, low, high = interval([y - x for x, y in zip(ours, theirs, strict=True)])
    return math.expm1(middle), math.expm1(low), math.expm1(high)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """A mean, and the ends of its 95 % interval by a bootstrap."""
    draw, number_of = random.Random(0), len(values)
    means = sorted(sum(draw.choices(values, k=number_of)) / number_of for _ in range(_RESAMPLES))
    low, high = means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
    return sum(values) / number_of, low, high


def percent(x: tuple[float, float, float]) -> str:
    """A difference and its interval."""
    middle, low, high = (f"{100 * one:+.1f}" for one in x)
    return f"{middle} ({low} to {high})"
