"""A table of results, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1  # leading columns that are words


def number(x: float, significant: int = 3) -> str:
    """A decimal of so many significant digits; whole numbers stay whole."""
    digits = max(significant - 1 - math.floor(math.log10(abs(x))), 0) if x else 0
    return f"{x:,.{digits}f}"


def unit_of(seconds: float) -> tuple[float, str]:
    return (1e-6, "µs") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1.0, "s")


def duration(timing: dict[str, float]) -> str:
    """Median ± half the interquartile range."""
    unit, name = unit_of(timing["median"])
    half = (timing["high"] - timing["low"]) / 2
    figures = number(timing["median"] / unit)
    decimals = len(figures.partition(".")[2])
    return f"{figures} ± {half / unit:.{decimals}f} {name}"


def dimensions(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def op_label(row: dict[str, Any]) -> str:
    suffix = " bf16" if row["dtype"] == "bfloat16" else ""
    return f"{row['op']}{suffix}"
