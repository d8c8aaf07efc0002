"""The part ``layers``: a projection and its scan, against PyTorch's recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import msrnn_ops as ms
from bench.measure import interleaved
from bench.peers import Function, Shape

_SHAPES: tuple[Shape, ...] = ((8, 512, 256),)
_FULL_SHAPES: tuple[Shape, ...] = (*_SHAPES, (1, 4096, 1024))


def _chunked(op: Function, parts: int) -> Function:
    return lambda projection: op(*projection.chunk(parts, -1))


def _both_passes(module: nn.Module, after: Function, x: Tensor) -> Callable[[], object]:
    """Forward and backward, down to the parameters and the layer's input."""
    wanted = (x, *module.parameters())
    grad = torch.randn_like(after(module(x)))
    return lambda: torch.autograd.grad(after(module(x)), wanted, grad)


def _first(output: tuple[Tensor, object]) -> Tensor:
    return output[0]


def _calls(shape: Shape) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    width = shape[-1]
    x = torch.randn(shape, requires_grad=True)
    two, three = nn.Linear(width, 2 * width), nn.Linear(width, 3 * width)
    return {
        "projection to 2 D": _both_passes(two, lambda y: y, x),
        "minGRU, joint": _both_passes(two, ms.min_gru_joint, x),
        "minGRU, chunks": _both_passes(two, _chunked(ms.min_gru, 2), x),
        "nn.GRU": _both_passes(nn.GRU(width, width, batch_first=True), _first, x),
        "projection to 3 D": _both_passes(three, lambda y: y, x),
        "minLSTM, joint": _both_passes(three, ms.min_lstm_joint, x),
        "minLSTM, chunks": _both_passes(three, _chunked(ms.min_lstm, 3), x),
        "nn.LSTM": _both_passes(nn.LSTM(width, width, batch_first=True), _first, x),
    }


def run(seconds: float, full: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in track(_FULL_SHAPES if full else _SHAPES, "layers  "):
        calls = _calls(shape)
        for call in calls.values():
            call()
        rows.append({"shape": shape, "layers": interleaved(calls, seconds)})
    return rows
