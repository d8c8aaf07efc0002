"""The ops under test, what else computes them in PyTorch today, and their float64 truth.

Every op is h_t = a_t h_{t-1} + b_t behind some pointwise functions, so ``coefficients`` (a, b) and
``logarithms`` (log a, log b) are all that a peer has to know about an op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.functional import relu, softplus

import msrnn_ops as ms

Function = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]
Pass = Callable[[], tuple[Tensor, ...]]
Shape = tuple[int, ...]


def g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def log_g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, (relu(x) + 0.5).log(), -softplus(-x))


def _min_gru_coefficients(gate: Tensor, candidate: Tensor) -> Pair:
    return torch.sigmoid(-gate), torch.sigmoid(gate) * g(candidate)


def _min_gru_logarithms(gate: Tensor, candidate: Tensor) -> Pair:
    return -softplus(gate), -softplus(-gate) + log_g(candidate)


def _min_lstm_coefficients(forget: Tensor, input: Tensor, candidate: Tensor) -> Pair:
    difference = softplus(-forget) - softplus(-input)
    return torch.sigmoid(-difference), torch.sigmoid(difference) * g(candidate)


def _min_lstm_logarithms(forget: Tensor, input: Tensor, candidate: Tensor) -> Pair:
    difference = softplus(-forget) - softplus(-input)
    return -softplus(difference), -softplus(-difference) + log_g(candidate)


@dataclass(frozen=True)
class Op:
    name: str
    ours: Function
    inputs: int
    coefficients: Callable[..., Pair]
    logarithms: Callable[..., Pair] | None  # None: b is signed, so log-space does not apply
    forward_tensors: int  # of B·T·D that must cross memory
    backward_tensors: int
    decay: Function | None = None  # makes the first input a decay
    logarithmic: bool = False  # the result is log h

    def draw(self, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
        first, *rest = (torch.randn(shape) for _ in range(self.inputs))
        if self.decay is not None:
            first = self.decay(first)
        return tuple(x.to(dtype).requires_grad_() for x in (first, *rest))

    def traffic(self, shape: Shape, dtype: torch.dtype, backward: bool) -> int:
        """Bytes that forward, or forward and backward, must move at least."""
        tensors = self.forward_tensors + (self.backward_tensors if backward else 0)
        return tensors * int(np.prod(shape)) * dtype.itemsize


def _log_decay(x: Tensor) -> Tensor:
    return -softplus(x)


_ALL_OPS = (
    Op("linear_scan", ms.linear_scan, 2, lambda a, b: (a, b), None, 3, 5, torch.sigmoid),
    Op("decay_scan", ms.decay_scan, 2, lambda a, b: (a.exp(), b), None, 3, 5, _log_decay),
    Op(
        "log_scan",
        ms.log_scan,
        2,
        lambda a, b: (a.exp(), b.exp()),
        lambda a, b: (a, b),
        3,
        6,
        _log_decay,
        logarithmic=True,
    ),
    Op("min_gru", ms.min_gru, 2, _min_gru_coefficients, _min_gru_logarithms, 3, 6),
    Op("min_lstm", ms.min_lstm, 3, _min_lstm_coefficients, _min_lstm_logarithms, 4, 8),
)
OPS = {op.name: op for op in _ALL_OPS}


def ours(op: Op) -> Function:
    return op.ours


def reference(op: Op) -> Function:
    """The project's own loop over time in plain PyTorch."""

    def call(*inputs: Tensor) -> Tensor:
        with ms.use_backend("reference"):
            return op.ours(*inputs)

    return call


def heinsen(op: Op) -> Function:
    """Heinsen 2023: two cumulative sums in log-space, the form that most PyTorch code uses."""
    logarithms = op.logarithms
    assert logarithms is not None

    def call(*inputs: Tensor) -> Tensor:
        log_a, log_b = logarithms(*inputs)
        log_decay = log_a.cumsum(1)
        log_h = log_decay + (log_b - log_decay).logcumsumexp(1)
        return log_h if op.logarithmic else log_h.exp()

    return call


def _compose(earlier: Pair, later: Pair) -> Pair:
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def associative(op: Op, mode: str = "generic") -> Function:
    """PyTorch's parallel scan."""

    def call(*inputs: Tensor) -> Tensor:
        pair = op.coefficients(*inputs)
        h: Tensor = associative_scan(_compose, pair, dim=1, combine_mode=mode)[1]
        return h.log() if op.logarithmic else h

    return call


def _compiled(function: Callable[[Op], Function]) -> Callable[[Op], Function]:
    return lambda op: torch.compile(function(op), dynamic=False)


OURS = "msrnn_ops"
REFERENCE = "reference loop"
HEINSEN = "Heinsen"
HEINSEN_COMPILED = "Heinsen compiled"
ASSOCIATIVE_COMPILED = "associative scan compiled"
COMPETITORS: dict[str, Callable[[Op], Function]] = {
    OURS: ours,
    HEINSEN: heinsen,
    HEINSEN_COMPILED: _compiled(heinsen),
    ASSOCIATIVE_COMPILED: _compiled(associative),
    REFERENCE: reference,
}
PEERS = tuple(name for name in COMPETITORS if name != OURS)


def forward_pass(function: Function, inputs: tuple[Tensor, ...]) -> Pass:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    return call


def both_passes(function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> Pass:
    """Forward and backward; the gradients of the inputs."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


class _Sequential(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t, one step after the other in float64, over tensors (T, D)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        h = _loop(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Pair:
        a, h = ctx.saved_tensors
        zero = torch.zeros_like(a[:1])
        later = torch.cat([a[1:], zero]).flip(0)
        s = _loop(later, grads[0].flip(0)).flip(0)
        return s * torch.cat([zero, h[:-1]]), s


def _loop(a: Tensor, b: Tensor) -> Tensor:
    decays, states = a.detach().numpy(), b.detach().clone().numpy()
    for t in range(1, len(states)):
        states[t] += decays[t] * states[t - 1]
    return torch.from_numpy(states)


def truth(op: Op, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """h and the gradients of the inputs in float64, of tensors (1, T, D)."""
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    a, b = op.coefficients(*wide)
    h: Tensor = _Sequential.apply(a[0], b[0])[None]  # type: ignore[no-untyped-call]
    h = h.log() if op.logarithmic else h
    return h.detach(), torch.autograd.grad(h, wide, grad.double())


def _same(x: Tensor) -> Tensor:
    return x


def _first(output: tuple[Tensor, object]) -> Tensor:
    return output[0]


def layers(width: int) -> dict[str, tuple[nn.Module, Function]]:
    """Layers by name: a module, and what is done to its output."""
    two, three = nn.Linear(width, 2 * width), nn.Linear(width, 3 * width)
    return {
        "projection to 2 D": (two, _same),
        "minGRU, joint": (two, ms.min_gru_joint),
        "minGRU, chunks": (two, lambda y: ms.min_gru(*y.chunk(2, -1))),
        "nn.GRU": (nn.GRU(width, width, batch_first=True), _first),
        "projection to 3 D": (three, _same),
        "minLSTM, joint": (three, ms.min_lstm_joint),
        "minLSTM, chunks": (three, lambda y: ms.min_lstm(*y.chunk(3, -1))),
        "nn.LSTM": (nn.LSTM(width, width, batch_first=True), _first),
    }


def layer_pass(
    module: nn.Module, after: Function, x: Tensor, *, backward: bool = True
) -> Callable[[], object]:
    """Forward; with backward down to the parameters and the layer's input."""

    def forward() -> Tensor:
        with torch.no_grad():
            return after(module(x))

    if not backward:
        return forward
    wanted, grad = (x, *module.parameters()), torch.randn_like(forward())
    return lambda: torch.autograd.grad(after(module(x)), wanted, grad)
