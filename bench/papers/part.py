"""What every part of ``bench.papers`` has in common.

A part is a module of its name with ``run(options, store)``, which returns JSON, and
``section(result)``, which makes of it what the report shows. Where a part repeats pieces of another
one, ``STORE`` is that part's name, and a command that runs both measures them once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bench.table import Table


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    full: bool  # a GPU's worth of work instead of three minutes of two cores
    device: str
    text: tuple[Path, ...]  # empty: Python's documentation topics
    model: Path | None  # a local Llama-style checkpoint
    dataset: Path | None  # a text file to evaluate it on
    quick: bool = False  # of the parts on pretrained models: minutes instead of hours
    cache: Path | None = None  # where fetched checkpoints are kept


class Store:
    """Results of a part, saved after every piece of work: a run goes on where it was stopped."""

    def __init__(self, path: Path, options: Options) -> None:
        self._path = path
        self._options = {k: str(v) for k, v in vars(options).items()}
        self._found: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}  # that each piece took
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["options"] == self._options:
                self._found, self._seconds = stored["pieces"], stored["seconds"]
        self.seconds_before = 0.0  # that pieces took which this run found

    def once(self, key: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """What `compute` returned, JSON, now or in an earlier run."""
        if key not in self._found:
            start = time.perf_counter()
            self._found[key] = compute(*arguments)
            self._seconds[key] = time.perf_counter() - start
            stored = {
                "options": self._options, "pieces": self._found, "seconds": self._seconds,
            }  # fmt: skip
            self._path.parent.mkdir(parents=True, exist_ok=True)
            written = self._path.with_suffix(".partial")
            written.write_text(json.dumps(stored))
            written.replace(self._path)
        else:
            self.seconds_before += self._seconds[key]
        return self._found[key]

    def file(self, name: str) -> Path:
        """Where a piece puts what is no JSON, such as weights; it goes when the command ends."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.with_name(f"{self._path.stem}-{name}")


@dataclass(frozen=True)
class Plot:
    name: str  # of the file, without a suffix
    caption: str
    draw: Callable[[Sequence[Axes]], None]
    columns: int = 1  # axes side by side


@dataclass(frozen=True)
class Section:
    """A part in the report."""

    title: str
    claim: str  # what the paper says, with its numbers
    found: str  # what was measured here, with its numbers
    comparable: str  # one sentence: what of it compares to the paper and what does not
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = field(default=())
