"""The scans under test: how their inputs are drawn, their shapes, the oracle, the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from backends import INTERPRETED
from torch import Tensor

import msrnn_ops as ms


@dataclass(frozen=True)
class Scan:
    """An op under test: its name, its function, and how its inputs are drawn."""

    name: str
    function: Callable[..., Tensor]
    draw: tuple[Callable[[Tensor], Tensor], ...]  # standard normal -> input
    joint: bool = False

    def inputs(self, batch: int, time: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
        parts = [f(torch.randn(batch, time, channels, dtype=torch.float64)) for f in self.draw]
        parts = [x.to(dtype) for x in parts]
        return [torch.cat(parts, -1)] if self.joint else parts

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.function(*args, **kwargs)


def _same(x: Tensor) -> Tensor:
    return x


SCANS = [
    Scan("linear_scan", ms.linear_scan, (torch.tanh, _same)),
    Scan("decay_scan", ms.decay_scan, (lambda x: -x.abs(), _same)),
    Scan("log_scan", ms.log_scan, (lambda x: -x.abs(), _same)),
    Scan("min_gru", ms.min_gru, (_same, _same)),
    Scan("min_gru_identity", partial(ms.min_gru, activation="identity"), (_same, _same)),
    Scan("min_lstm", ms.min_lstm, (_same, _same, _same)),
    Scan("min_lstm_identity", partial(ms.min_lstm, activation="identity"), (_same,) * 3),
    Scan("min_gru_joint", ms.min_gru_joint, (_same, _same), joint=True),
    Scan("min_lstm_joint", ms.min_lstm_joint, (_same, _same, _same), joint=True),
]
scans = pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.name)

# Shapes (B, T, D): nothing, one step, odd sizes, whole vectors, and both plans of the kernels (few
# channels and many steps: tiles of time in parallel; many channels: a walk).
SHAPES = [(2, 0, 3), (0, 4, 3), (2, 5, 0), (1, 1, 1), (3, 1, 7), (2, 37, 33), (5, 64, 48)]
SHAPES += [(1, 300, 130), (2, 400, 100), (1, 40, 1100)]
if INTERPRETED:
    SHAPES = [*SHAPES[:6], (7, 9, 48), (1, 130, 130)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@contextmanager
def reference() -> Iterator[None]:
    """The reference backend on one thread: its tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ms.use_backend("reference"):
            yield
    finally:
        torch.set_num_threads(threads)


def oracle(scan: Scan, inputs: list[Tensor], h0: Tensor | None = None, **options: object) -> Tensor:
    """The same call in float64, one step at a time."""
    wide = [x.double() for x in inputs]
    with reference():
        return scan(*wide, None if h0 is None else h0.double(), **options)


def norm_error(x: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm, of numbers of size 0.5 at least on average."""
    assert x.shape == exact.shape
    size = max(exact.norm().item(), 0.5 * max(exact.numel(), 1) ** 0.5)
    return (x.double() - exact).norm().item() / size


def gradients(
    scan: Scan,
    inputs: list[Tensor],
    h0: Tensor | None,
    weights: tuple[Tensor, Tensor],
    **options: object,
) -> tuple[list[Tensor], list[Tensor]]:
    """([h, last], gradients of inputs and h0) of a weighted sum of all states and last states."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *([] if h0 is None else [h0]))]
    state = leaves[-1] if h0 is not None else None
    h, last = scan(*leaves[: len(inputs)], state, return_state=True, **options)
    total = (h.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    total = total + sum(0 * x.double().sum() for x in leaves)  # at T = 0 nothing else ties them
    return [h.detach(), last.detach()], list(torch.autograd.grad(total, leaves))


def poison() -> None:
    """Leaves NaN in the memory that the next outputs are likely to be given."""
    for size in (1 << 8, 1 << 12, 1 << 16):
        blocks = [torch.full((size,), torch.nan) for _ in range(8)]
        del blocks
