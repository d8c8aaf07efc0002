"""The recurrences, one step at a time, as one would write them on a blackboard.

Slow, any device, any floating dtype, differentiable by PyTorch itself. In float64 this is the truth
that every kernel is tested against. 16-bit inputs are computed in float32, like everywhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

Step = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def g(x: Tensor) -> Tensor:
    """x + 1/2 for x >= 0, sigma(x) otherwise: positive, continuous, and its slope is too."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def activate(x: Tensor, activation: str) -> Tensor:
    return g(x) if activation == "g" else x


def linear_step(h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    a, b = x
    return a * h + b


def decay_step(h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    log_a, b = x
    return log_a.exp() * h + b


def log_step(log_h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    log_a, log_b = x
    left = log_a + log_h
    larger, lesser = torch.maximum(left, log_b), torch.minimum(left, log_b)
    distance = torch.where(larger == lesser, 0.0, lesser - larger)
    dead = larger == -torch.inf  # log(0 + 0): no gradient flows
    return torch.where(dead, -torch.inf, larger + torch.log1p(distance.exp()))


def min_gru_step(h: Tensor, x: tuple[Tensor, ...], activation: str) -> Tensor:
    gate, candidate = x
    z = torch.sigmoid(gate)
    return torch.sigmoid(-gate) * h + z * activate(candidate, activation)


def min_lstm_step(h: Tensor, x: tuple[Tensor, ...], activation: str) -> Tensor:
    forget, input, candidate = x
    # f / (f + i) and i / (f + i), without forming f and i, which may both be 0.
    difference = softplus(-forget) - softplus(-input)
    keep, take = torch.sigmoid(-difference), torch.sigmoid(difference)
    return keep * h + take * activate(candidate, activation)


def scan(
    step: Step,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    *,
    start: float = 0.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states (B, T, D) and the last one of each sequence, in the accumulation dtype."""
    dtype = inputs[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = tuple(x.to(wide) for x in inputs)
    batch, time, channels = inputs[0].shape
    if cu_seqlens is None:
        rows = [tuple(x[b] for x in inputs) for b in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        rows = [tuple(x[0, s:e] for x in inputs) for s, e in itertools.pairwise(ends)]
    outputs, lasts = [], []
    for n, row in enumerate(rows):
        h = (
            torch.full_like(inputs[0][0, 0], start)
            if time
            else inputs[0].new_full((channels,), start)
        )
        if h0 is not None:
            h = h0[n].to(wide)
        states: list[Tensor] = [h.new_empty(0, channels)]
        length = row[0].shape[0]
        for t in reversed(range(length)) if reverse else range(length):
            h = step(h, tuple(x[t] for x in row))
            states.append(h[None])
        outputs.append(torch.cat(states[:1] + states[:0:-1] if reverse else states))
        lasts.append(h)
    empty = inputs[0].new_empty
    h_all = torch.cat(outputs) if outputs else empty(0, channels)
    last = torch.stack(lasts) if lasts else empty(0, channels)
    return h_all.reshape(batch, time, channels).to(dtype), last
