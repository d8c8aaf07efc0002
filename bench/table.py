"""A table of results, how its numbers are written, and how it is shown."""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.status import Status
from rich.table import Table as RichTable
from rich.text import Text

WIDTH = 150  # of tables that go into a file
_START = time.perf_counter()


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1  # leading columns that are words


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def running(what: str) -> Status:
    """Names in a terminal what is being measured, for as long as it takes."""
    return get_console().status(what)


def say(*words: str) -> None:
    """A line of progress, with the seconds since the program began."""
    elapsed = f"{time.perf_counter() - _START:4.0f} s "
    get_console().print(elapsed, *words, soft_wrap=True, highlight=False, markup=False)


def say_times(label: str, results: dict[str, dict[str, Any]], ours: str) -> None:
    """Our time, and how many times as long the others took."""
    others = [f"{name} {times_as_long(results, name, ours)}" for name in results if name != ours]
    say(f"{label}:", ", ".join([f"{ours} {time_or_failure(results[ours])}", *others]))


def show(*tables: Table) -> None:
    """Tables in the terminal."""
    for table in tables:
        shown = RichTable(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for i, column in enumerate(table.columns):
            header = textwrap.fill(column, 12, break_long_words=False)
            shown.add_column(header, justify="left" if i < table.labels else "right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console().print(Text(f"\n{table.title}", style="bold"))
        if table.note:
            console().print(Text(table.note, style="dim"))
        console().print(shown)


def markdown(table: Table) -> str:
    rule = [":--"] * table.labels + ["--:"] * (len(table.columns) - table.labels)
    lines = ["| " + " | ".join(row) + " |" for row in (table.columns, rule, *table.rows)]
    return f"**{table.title}.** {table.note}\n\n" + "\n".join(lines)


def number(x: float, significant: int = 3) -> str:
    """A decimal of so many significant digits; whole numbers stay whole."""
    digits = max(significant - 1 - math.floor(math.log10(abs(x))), 0) if x else 0
    return f"{x:,.{digits}f}"


def _unit_of(seconds: float) -> tuple[float, str]:
    return (1e-6, "µs") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1.0, "s")


def duration(timing: dict[str, float]) -> str:
    """Median ± half the interquartile range."""
    unit, name = _unit_of(timing["median"])
    half = (timing["high"] - timing["low"]) / 2
    figures = number(timing["median"] / unit)
    decimals = len(figures.partition(".")[2])
    return f"{figures} ± {half / unit:.{decimals}f} {name}"


def time_or_failure(result: dict[str, Any]) -> str:
    return duration(result["time"]) if "time" in result else str(result["failed"])


def times_as_long(results: dict[str, dict[str, Any]], peer: str, ours: str) -> str:
    """How many times as long as ours a peer takes, and its time; nothing where it did not run."""
    if peer not in results:
        return ""
    if "time" not in results[peer] or "time" not in results[ours]:
        return time_or_failure(results[peer])
    median = results[peer]["time"]["median"]
    unit, name = _unit_of(median)
    ratio = number(median / results[ours]["time"]["median"], 2)
    return f"{ratio}× ({number(median / unit, 2)} {name})"


def dimensions(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def op_label(row: dict[str, Any]) -> str:
    suffix = " bf16" if row["dtype"] == "bfloat16" else ""
    return f"{row['op']}{suffix}"
