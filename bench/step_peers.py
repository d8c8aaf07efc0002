"""One decode step of multi-state attention, by us and by what else does it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import msrnn_ops as ms
from bench.measure import largest_error

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer."""

    query: int = 32
    kv: int = 8
    dim: int = 128


GROUPED = Heads()
TOVA, WINDOW = "TOVA", "Window"
OFFICIAL, IN_PLACE, ATTENTION = "official TOVA steps", "in-place PyTorch", "attention alone"


@dataclass(frozen=True)
class Tokens:
    """Random tokens of one shape; ``next()`` walks around them."""

    drawn: list[tuple[Tensor, Tensor, Tensor]]

    @staticmethod
    def draw(batch: int, dtype: torch.dtype, heads: Heads = GROUPED) -> Tokens:
        def random(count: int) -> Tensor:
            return torch.randn(batch, count, heads.dim).to(dtype)

        return Tokens([(random(heads.query), random(heads.kv), random(heads.kv)) for _ in range(8)])

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        self.drawn.append(self.drawn.pop(0))
        return self.drawn[-1]


def full_state(
    policy: ms.Policy, batch: int, dtype: torch.dtype, heads: Heads = GROUPED
) -> ms.MultiState:
    """A state that has seen as many tokens as it has slots."""
    state = ms.MultiState(policy, batch=batch, kv_heads=heads.kv, head_dim=heads.dim, dtype=dtype)
    slots = policy.slots
    state.keys.normal_()
    state.values.normal_()
    state.position[..., :slots] = torch.arange(slots)
    state.free.fill_(slots)
    state.seen.fill_(slots)
    return state


def ours(state: ms.MultiState, tokens: Tokens) -> Call:
    return lambda: ms.attend_evict(*tokens.next(), state)


def official(keys: Tensor, values: Tensor, tokens: Tokens) -> Call:
    """The published procedure: concatenate, eager weights, mean, top-k, sort, gather."""
    slots, kv_heads, head_dim = keys.shape[2], keys.shape[1], keys.shape[3]
    shared = tokens.drawn[0][0].shape[1] // kv_heads
    kept = [keys, values]
    read = list(kept)

    def step() -> Tensor:
        q, k, v = tokens.next()
        k, v = (torch.cat([x, y[:, :, None]], 2) for x, y in zip(kept, (k, v), strict=True))
        wide_k, wide_v = (x.repeat_interleave(shared, 1) for x in (k, v))
        logits = q[:, :, None] @ wide_k.transpose(2, 3) * head_dim**-0.5
        weights = logits.softmax(-1, dtype=torch.float32)
        out = (weights.to(q.dtype) @ wide_v)[:, :, 0]
        index = weights[:, :, -1].mean(1).topk(slots, -1).indices.sort().values
        index = index[:, None, :, None].expand(-1, kv_heads, -1, head_dim)
        read[:] = kept  # a captured step reads them again
        kept[:] = k.gather(2, index), v.gather(2, index)
        return out

    return step


def in_place(keys: Tensor, values: Tensor, tokens: Tokens) -> Call:
    """Grouped matmul, argmin and one overwritten slot: what a careful PyTorch user writes."""
    batch, kv_heads, _, head_dim = keys.shape
    keys, values = (torch.cat([x, x[:, :, :1]], 2) for x in (keys, values))
    free, rows = torch.full((batch,), keys.shape[2] - 1), torch.arange(batch)
    read = free

    def step() -> Tensor:
        nonlocal free, read
        read = free  # a captured step reads it again
        q, k, v = tokens.next()
        keys[rows, :, free], values[rows, :, free] = k, v
        grouped = q.unflatten(1, (kv_heads, -1))
        logits = (grouped @ keys.transpose(2, 3)).float() * head_dim**-0.5
        weights = logits.softmax(-1)
        out = (weights.to(q.dtype) @ values).flatten(1, 2)
        free = weights.flatten(1, 2).mean(1).argmin(-1)
        return out

    return step


def attention_alone(keys: Tensor, values: Tensor, tokens: Tokens) -> Call:
    def step() -> Tensor:
        q = tokens.next()[0][:, :, None]
        return scaled_dot_product_attention(q, keys, values, enable_gqa=True)[:, :, 0]

    return step


def error_of_step(state: ms.MultiState, tokens: Tokens) -> float:
    """Of our output's first row against float64, over the largest true value."""
    keys, values = state.keys[:1].double(), state.values[:1].double()
    q, k, v = (x[:1].double() for x in tokens.next())
    keys[:, :, -1], values[:, :, -1] = k, v
    tokens.drawn.insert(0, tokens.drawn.pop())  # the same token again
    grouped = q.unflatten(1, (keys.shape[1], -1))
    weights = (grouped @ keys.transpose(2, 3) * keys.shape[3] ** -0.5).softmax(-1)
    return largest_error([ours(state, tokens)()[:1]], [(weights @ values).flatten(1, 2)])
