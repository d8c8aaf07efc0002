"""The part ``limits``: how fast memory can be moved, and how long a launch takes at least."""

from __future__ import annotations

from typing import Any

import torch

from bench.cuda.gpu import Call, Gpu, divided, release
from bench.measure import Entries, Timing
from bench.table import say

COPIES = tuple(megabytes << 20 for megabytes in (6, 24, 96, 256, 1024))
_CALLS = 64  # of an empty kernel in one graph


def _add(gpu: Gpu, traffic: int) -> Call:
    """Two reads for each write, as in the forward pass of most ops."""
    a, b, c = (gpu.randn(max(traffic // 12, 1)) for _ in range(3))
    return lambda: torch.add(a, b, out=c)


def empty_launch(gpu: Gpu, seconds: float) -> Timing:
    gpu.empty_kernel()
    replay, _ = gpu.captured(gpu.empty_kernel, _CALLS)
    taken = gpu.interleaved({"": replay}, seconds, cold=False)[""]
    return divided(taken, _CALLS)


def run(gpu: Gpu, seconds: float) -> Entries:
    """How fast memory can be copied, cold; how long a launch takes at least."""
    rows: list[dict[str, Any]] = []
    limits = {"empty_kernel": empty_launch(gpu, seconds), "copies": rows}
    for size in COPIES:
        calls = {"copy": gpu.copy(size), "add": _add(gpu, size)}
        for call in calls.values():
            call()
        replays = {name: gpu.captured(call)[0] for name, call in calls.items()}
        times = gpu.interleaved(replays, seconds)
        rates = {name: size / taken["median"] for name, taken in times.items()}
        rows.append({"traffic": size, "bytes_per_second": rates, "times": times})
        say(f"limits {size >> 20} MiB:", *(f"{k} {v / 1e9:.0f} GB/s" for k, v in rates.items()))
        yield {"limits": limits}
        del calls, replays
        release()
