"""The part ``small``: the time of one call of short scans and of steps."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import msrnn_ops as ms
from bench.cuda.gpu import DTYPES, Call, Gpu, divided, failed, name_of, release
from bench.measure import Entries
from bench.peers import Shape
from bench.table import dimensions, say_times

_SCANS: tuple[Shape, ...] = ((1, 512, 256), (8, 512, 256), (1, 1, 1024), (64, 1, 1024))
SHAPES: tuple[Shape, ...] = (*_SCANS, (1, 1024), (64, 1024))
_COUNT = 64  # calls in one graph
_EMPTY = "empty kernel"


def _calls(gpu: Gpu, shape: Shape, dtype: torch.dtype) -> dict[str, Call]:
    """The scans at (B, T, D), the step forms at (B, D)."""
    x, y, z = (gpu.randn(*shape).to(dtype) for _ in range(3))
    h = torch.zeros_like(x)
    if len(shape) == 2:
        return {
            "min_gru_step": lambda: ms.min_gru_step(x, y, h),
            "min_lstm_step": lambda: ms.min_lstm_step(x, y, z, h),
        }
    decay = x.sigmoid()
    return {
        "min_gru": lambda: ms.min_gru(x, y),
        "min_lstm": lambda: ms.min_lstm(x, y, z),
        "linear_scan": lambda: ms.linear_scan(decay, y),
    }


@torch.no_grad()
def _row(gpu: Gpu, shape: Shape, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    calls: dict[str, Call] = {_EMPTY: gpu.empty_kernel, **_calls(gpu, shape, dtype)}
    replays: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            call()
            replays[name], graph = gpu.captured(call, _COUNT)
        except Exception as problem:
            results[name] = failed(name, problem)
        else:
            results[name] = {"graph": graph}
    for name, taken in gpu.interleaved(replays, seconds, cold=False).items():
        results[name]["time"] = divided(taken, _COUNT)
    return {"shape": shape, "dtype": name_of(dtype), "calls": results}


def run(gpu: Gpu, seconds: float) -> Entries:
    """Time per call of small forward passes, one after the other in a graph, the L2 warm."""
    rows: list[dict[str, Any]] = []
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        rows.append(_row(gpu, shape, dtype, seconds))
        label = f"small calls {dimensions(shape)} {name_of(dtype)}"
        say_times(label, rows[-1]["calls"], _EMPTY)
        yield {"small": rows}
        release()
