"""The part ``steps``: one decode step of multi-state attention, and a decode loop of 32 layers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import msrnn_ops as ms
from bench.limits import reader
from bench.measure import interleaved, largest_error

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer."""

    query: int = 32
    kv: int = 8
    dim: int = 128


GROUPED = Heads()
_SLOTS = (512, 2048, 8192)
_FULL_SLOTS = (*_SLOTS, 65536)
_BATCHES = (1, 4)
_LAYERS, _LOOP_SLOTS, _LOOP_TOKENS = 32, 2048, 8192
_LARGEST_OFFICIAL = 1 << 30  # bytes of keys and values: it holds eight times as much
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


@torch.no_grad()
def _run_step(slots: int, batch: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens = Tokens.draw(batch, dtype)
    error = error_of_step(full_state(ms.Policy.tova(slots), batch, dtype), tokens)
    tova = full_state(ms.Policy.tova(slots), batch, dtype)
    window = full_state(ms.Policy.window(slots), batch, dtype)
    keys, values = (x[:, :, :slots].clone() for x in (tova.keys, tova.values))
    traffic = 2 * keys.numel() * keys.element_size()
    calls: dict[str, Callable[[], object]] = {
        TOVA: ours(tova, tokens),
        WINDOW: ours(window, tokens),
        IN_PLACE: in_place(keys, values, tokens),
        ATTENTION: attention_alone(keys, values, tokens),
        "read": reader(traffic),
    }
    if traffic <= _LARGEST_OFFICIAL:
        calls[OFFICIAL] = official(keys, values, tokens)
    for call in calls.values():
        call()
    timings = interleaved(calls, seconds)
    return {
        "slots": slots,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "traffic": traffic,
        "error": error,
        "read": timings.pop("read"),
        "competitors": timings,
    }


def run_steps(seconds: float, full: bool) -> list[dict[str, Any]]:
    cases = list(
        itertools.product(
            (torch.float32, torch.bfloat16), _FULL_SLOTS if full else _SLOTS, _BATCHES
        )
    )
    return [
        _run_step(slots, batch, dtype, seconds) for dtype, slots, batch in track(cases, "steps   ")
    ]


@torch.no_grad()
def run_loop(seconds: float) -> dict[str, Any]:
    """Tokens a second of 32 layers' attention, B = 1, bfloat16, and the memory that they keep."""
    dtype, tokens = torch.bfloat16, Tokens.draw(1, torch.bfloat16)
    policy = ms.Policy.tova(_LOOP_SLOTS)

    def cache(length: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, GROUPED.kv, length, GROUPED.dim, dtype=dtype)
        return x, x.clone()

    def of_states() -> tuple[list[Call], int]:
        states = [full_state(policy, 1, dtype) for _ in range(_LAYERS)]
        return [ours(state, tokens) for state in states], sum(state.nbytes for state in states)

    def of_caches(make: Callable[..., Call], length: int) -> tuple[list[Call], int]:
        caches = [cache(length) for _ in range(_LAYERS)]
        size = sum(x.numel() * x.element_size() for pair in caches for x in pair)
        return [make(*pair, tokens) for pair in caches], size

    contenders: dict[str, Callable[[], tuple[list[Call], int]]] = {
        "msrnn_ops, TOVA": of_states,
        IN_PLACE: lambda: of_caches(in_place, _LOOP_SLOTS),
        OFFICIAL: lambda: of_caches(official, _LOOP_SLOTS),
        f"full cache of {_LOOP_TOKENS:,} tokens, attention alone": lambda: of_caches(
            attention_alone, _LOOP_TOKENS
        ),
    }
    rows = {}
    for name, prepare in track(contenders.items(), "decoding", total=len(contenders)):
        layers, size = prepare()
        for layer in layers:
            layer()
        count, start = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - start < 5 * seconds:
            for layer in layers:
                layer()
            count += 1
        rows[name] = {
            "tokens_per_second": count / (time.perf_counter() - start),
            "bytes": size,
        }
    return {"layers": _LAYERS, "slots": _LOOP_SLOTS, "contenders": rows}
