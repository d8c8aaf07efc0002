"""The part ``small``: calls so small that what is around a kernel takes the time, one thread."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import msrnn_ops as ms
from bench.measure import Entries, interleaved
from bench.table import duration, say

Call = Callable[[], object]
SIZES = ((1, 64), (8, 64), (1, 256), (8, 256))  # rows, width
_LENGTHS = (1, 16)
_NUMBERS, _SLOTS = 16, 16
_TOGETHER = 20  # calls between two looks at the clock
CELLS: dict[str, type[Any]] = {"MinGRU": ms.nn.MinGRU, "MinLSTM": ms.nn.MinLSTM}


def _ops() -> dict[str, Call]:
    """The smallest calls, beside an addition of as many numbers."""
    x, y = torch.randn(2, _NUMBERS)
    gate, leaf = torch.randn(1, 1, _NUMBERS), torch.randn(1, 1, _NUMBERS, requires_grad=True)
    state = ms.MultiState(ms.Policy.tova(_SLOTS), batch=1, kv_heads=2, head_dim=16)
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    return {
        "add": lambda: torch.add(x, y),
        "min_gru": lambda: ms.min_gru(gate, gate),
        "min_gru, recorded": lambda: ms.min_gru(leaf, leaf),
        "attend_evict": lambda: ms.attend_evict(q, k, v, state),
    }


def _pass(layer: nn.Module, x: Tensor, backward: bool) -> Call:
    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return (lambda: layer(x)[0].sum().backward()) if backward else forward


def _layers(rows: int, width: int, time: int, backward: bool) -> dict[str, Call]:
    x = torch.randn(time, rows, width)
    kinds = {"nn.GRU": nn.GRU, **CELLS}
    return {name: _pass(kind(width, width), x, backward) for name, kind in kinds.items()}


def by_hand(name: str, linear: nn.Linear, x: Tensor, h: Tensor) -> Tensor:
    """A step as PyTorch code has it: a linear layer, and operators by the equations."""
    *gates, candidate = linear(x).chunk(2 if name == "MinGRU" else 3, -1)
    gates = [torch.sigmoid(gate) for gate in gates]
    new = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
    if name == "MinGRU":
        return torch.lerp(h, new, gates[0])
    forget, enter = gates
    return (forget * h + enter * new) / (forget + enter)


def _steps(name: str, rows: int, width: int) -> dict[str, Call]:
    layer, linear = CELLS[name](width, width), nn.Linear(width, (2 + (name == "MinLSTM")) * width)
    x, h = torch.randn(rows, width), torch.rand(1, rows, width)
    hx = h if name == "MinGRU" else (h, h)
    return {"by hand": lambda: by_hand(name, linear, x, h[0]), name: lambda: layer.step(x, hx)}


def _timed(calls: Mapping[str, Call], seconds: float) -> dict[str, Any]:
    def often(call: Call) -> Call:
        def repeated() -> None:
            for _ in range(_TOGETHER):
                call()

        return repeated

    for call in calls.values():
        call()
    times = interleaved({name: often(call) for name, call in calls.items()}, seconds)
    for time in times.values():
        for figure in ("median", "low", "high"):
            time[figure] /= _TOGETHER
    return dict(times)


def run(seconds: float) -> Entries:
    """Of each table a row for each size; the first call of a row is what the others are put to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def row(kind: str, size: str, calls: Mapping[str, Call]) -> Entries:
        times = _timed(calls, seconds)
        rows.append({"kind": kind, "size": size, "times": times})
        shown = ", ".join(f"{name} {duration(time)}" for name, time in times.items())
        say(f"{kind}, {size}: {shown}")
        yield {"small": rows}

    try:
        yield from row("one call", f"{_NUMBERS} numbers or slots", _ops())
        for time, backward in itertools.product(_LENGTHS, (False, True)):
            kind = "forward and backward" if backward else "forward"
            for size in SIZES:
                calls = _layers(*size, time, backward)
                yield from row(f"layers, {kind}", f"{size[0]}×{time}×{size[1]}", calls)
        with torch.no_grad():
            for name, size in itertools.product(CELLS, SIZES):
                yield from row("step", f"{size[0]}×{size[1]}", _steps(name, *size))
    finally:
        torch.set_num_threads(threads)
