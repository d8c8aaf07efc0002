"""The parts ``steps`` and ``decoding``: one decode step of multi-state attention, and 32 layers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import msrnn_ops as ms
from bench.cpu.limits import reader
from bench.measure import Entries, interleaved
from bench.step_peers import (
    ATTENTION,
    GROUPED,
    IN_PLACE,
    OFFICIAL,
    TOVA,
    WINDOW,
    Call,
    Tokens,
    attention_alone,
    error_of_step,
    full_state,
    in_place,
    official,
    ours,
)
from bench.table import number, running, say, say_times

_SLOTS, _QUICK_SLOTS = (512, 2048, 8192, 65536), 3
_BATCHES = (1, 4)
_LAYERS, _LOOP_SLOTS, _LOOP_TOKENS = 32, 2048, 8192
_LARGEST_OFFICIAL = 1 << 30  # bytes of keys and values: it holds eight times as much


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


def run(seconds: float, full: bool) -> Entries:
    rows: list[dict[str, Any]] = []
    dtypes, slots = (torch.float32, torch.bfloat16), _SLOTS if full else _SLOTS[:_QUICK_SLOTS]
    for dtype, count, batch in itertools.product(dtypes, slots, _BATCHES):
        label = f"decode step {str(dtype).removeprefix('torch.')} {batch}×{count:,}"
        with running(label):
            rows.append(_run_step(count, batch, dtype, seconds))
        say_times(label, {k: {"time": v} for k, v in rows[-1]["competitors"].items()}, TOVA)
        yield {"steps": rows}


@torch.no_grad()
def run_decoding(seconds: float) -> Entries:
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
    rows: dict[str, dict[str, float]] = {}
    for name, prepare in contenders.items():
        with running(f"decoding, {name}"):
            layers, size = prepare()
            rows[name] = {"tokens_per_second": _rate(layers, 5 * seconds), "bytes": size}
        say(f"decoding, {name}: {number(rows[name]['tokens_per_second'])} tokens/s")
        yield {"decoding": {"layers": _LAYERS, "slots": _LOOP_SLOTS, "contenders": rows}}


def _rate(layers: list[Call], seconds: float) -> float:
    """Tokens a second through all layers."""
    for layer in layers:
        layer()
    count, start = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        for layer in layers:
            layer()
        count += 1
    return count / (time.perf_counter() - start)
