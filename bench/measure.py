"""Timing of competitors side by side, and their error and peak memory."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, and the program may start once more
    from torch import Tensor

Entries = Iterator[dict[str, Any]]  # of the results, whenever they have grown
Timing = dict[str, float]  # seconds: median, low and high quartile; count

# Freed blocks are reused instead of returned to the system, for every competitor alike, so that
# the work is timed and not the page faults of its outputs.
REUSE_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
_ROUNDS = 5
_FEWEST = 3  # calls of a competitor, however slow


def reuse_freed_memory() -> None:
    """Starts this process again with these allocator settings, unless it has them."""
    if any(name not in os.environ for name in REUSE_FREED_MEMORY):
        environment = {**os.environ, **REUSE_FREED_MEMORY}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def timing(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "count": len(times)}


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times each call for about `seconds`, in turns, so that a disturbance meets all of them.

    The calls must have been warmed up. One that takes longer than `seconds` runs three times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            mine = times[name]
            if len(mine) >= _FEWEST and sum(mine) > seconds:
                continue
            turn = 0.0
            while turn < seconds / _ROUNDS:
                start = time.perf_counter()
                call()
                mine.append(time.perf_counter() - start)
                turn += mine[-1]
    return {name: timing(mine) for name, mine in times.items()}


def largest_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest error of any element over the largest true value; the worst tensor counts."""
    errors = [
        (value.double() - truth).abs().max() / truth.abs().max()
        for value, truth in zip(values, truths, strict=True)
    ]
    return float(max(errors))


def norm_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the error over the norm of the truth."""
    return float((value.double() - truth).norm() / truth.norm())


def _status(field: str) -> int:
    """A memory field of this process in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak resident memory during a call, above what is resident before it. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # resets the peak, VmHWM
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before
