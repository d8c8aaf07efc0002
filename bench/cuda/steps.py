"""The parts ``steps`` and ``decoding``: one decode step of multi-state attention beside what else
attends or evicts on a GPU, and the tokens a second of a whole decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import msrnn_ops as ms
from bench.cuda.gpu import Call, Gpu, failed, name_of, release
from bench.measure import Entries
from bench.step_peers import (
    ATTENTION,
    GROUPED,
    IN_PLACE,
    OFFICIAL,
    TOVA,
    WINDOW,
    Heads,
    Tokens,
    error_of_step,
    full_state,
    in_place,
    official,
    ours,
)
from bench.table import say, say_times

Shape = tuple[int, int]  # batch, slots
StepCall = Callable[[], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v of a token

TRITON = "TOVA, Triton"
FLEX, SCORED = "FlexAttention", "flash decode, K pass, argmin"
FLASH, FLASHINFER = "flash-attn", "FlashInfer"
H2O, READ, COPY = "H2O", "read", "copy"
ATTENDING = (ATTENTION, FLEX, FLASH, FLASHINFER)  # of one token, and nothing else
MULTI_HEAD, MULTI_QUERY = Heads(32, 32), Heads(32, 1)

SHAPES: tuple[Shape, ...] = ((1, 512), (1, 2048), (1, 8192), (16, 1024), (16, 8192), (128, 512))
_FULL_SHAPES: tuple[Shape, ...] = (*SHAPES, (1, 65536), (4, 8192), (64, 4096))
OTHERS = ((MULTI_HEAD, (16, 1024)), (Heads(64, 8), (16, 1024)), (MULTI_QUERY, (16, 8192)))
COMPILED = ((1, 8192), (16, 1024), (128, 512))  # where there is time to compile a peer
_LARGEST_OFFICIAL = 2 << 30  # bytes of keys and values: it holds eight times as much

# The decoder: LLaMA-2-7B but for its embeddings, with random weights.
_LAYERS, _WIDTH, _INNER, _CONTEXT = 32, 4096, 11008, 4096
_BATCHES = (1, 4, 16, 32, 64, 128)
_FRACTIONS = (8, 4)  # of the context that is kept


# One step. The query heads that share keys and values are so many queries to these peers: none has
# to repeat the keys.


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    return q.unflatten(1, (kv_heads, -1))


def _attention(keys: Tensor, values: Tensor, tokens: Tokens) -> StepCall:
    def step() -> Tensor:
        q = _grouped(tokens.next()[0], keys.shape[1])
        return scaled_dot_product_attention(q, keys, values).flatten(1, 2)

    return step


def _flex(keys: Tensor, values: Tensor, tokens: Tokens) -> StepCall:
    attend: Callable[..., Tensor] = torch.compile(
        import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False
    )

    def step() -> Tensor:
        return attend(_grouped(tokens.next()[0], keys.shape[1]), keys, values).flatten(1, 2)

    return step


def _scored(keys: Tensor, values: Tensor, tokens: Tokens) -> StepCall:
    """Attention and its log-sum-exp, a pass over the keys for the weights, victim and slot."""
    batch, kv_heads, _, head_dim = keys.shape
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    rows = torch.arange(batch, device=keys.device)
    free = read = torch.zeros_like(rows)

    def step() -> Tensor:
        nonlocal free, read
        read = free  # a captured step reads it again
        q, k, v = tokens.next()
        keys[rows, :, free], values[rows, :, free] = k, v
        q = _grouped(q, kv_heads)
        out, log_sum = attend(q, keys, values)[:2]
        logits = (q @ keys.transpose(2, 3)).float() * head_dim**-0.5
        weights = (logits - log_sum[:, :, : q.shape[2], None]).exp()
        free = weights.sum((1, 2)).argmin(-1)
        return out.flatten(1, 2)

    return step


def _flash_attn(keys: Tensor, values: Tensor, tokens: Tokens) -> StepCall:
    attend = import_module("flash_attn").flash_attn_with_kvcache
    keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))

    def step() -> Tensor:
        out: Tensor = attend(tokens.next()[0][:, None], keys, values)
        return out[:, 0]

    return step


def _flashinfer(keys: Tensor, values: Tensor, tokens: Tokens) -> StepCall:
    attend = import_module("flashinfer").single_decode_with_kv_cache

    def step() -> Tensor:
        out: Tensor = attend(
            tokens.next()[0][0], keys[0], values[0], kv_layout="HND", use_tensor_cores=True
        )
        return out[None]

    return step


def _peers(
    shape: Shape, traffic: int, dtype: torch.dtype, compiled: bool
) -> dict[str, Callable[..., StepCall]]:
    peers: dict[str, Callable[..., StepCall]] = {ATTENTION: _attention}
    peers |= {FLEX: _flex} if compiled else {}
    if dtype != torch.float32:
        peers[SCORED] = _scored
        peers |= {FLASH: _flash_attn} if find_spec("flash_attn") else {}
        peers |= {FLASHINFER: _flashinfer} if find_spec("flashinfer") and shape[0] == 1 else {}
    peers[IN_PLACE] = in_place
    return peers | ({OFFICIAL: official} if traffic <= _LARGEST_OFFICIAL else {})


def _by_triton(step: StepCall) -> StepCall:
    def chosen() -> Tensor:
        with ms.use_backend("triton"):
            return step()

    return chosen


def _policies(slots: int) -> dict[str, ms.Policy]:
    tova, window = ms.Policy.tova(slots), ms.Policy.window(slots)
    return {TOVA: tova, WINDOW: window, H2O: ms.Policy.h2o(slots, recent=slots // 2)}


def _step_calls(
    gpu: Gpu, heads: Heads, shape: Shape, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Call], dict[str, Any], int, float]:
    """Replays by name, what became of each, the bytes of keys and values, and our error."""
    torch.manual_seed(0)
    batch, slots = shape
    results: dict[str, Any] = {}
    replays: dict[str, Call] = {}

    def add(name: str, make: Callable[[], Call]) -> None:
        try:
            call = make()
            call()
            replays[name], graph = gpu.captured(call)
            results[name] = {"graph": graph}
        except Exception as problem:
            results[name] = failed(name, problem)

    with gpu.device:
        tokens = Tokens.draw(batch, dtype, heads)
        policies = _policies(slots)
        state = full_state(policies[TOVA], batch, dtype, heads)
        keys, values = (x[:, :, :slots].contiguous() for x in (state.keys, state.values))
        error = error_of_step(state, tokens)
        traffic = 2 * keys.numel() * keys.element_size()
        everything = torch.zeros(traffic // 4)
        add(COPY, lambda: gpu.copy(traffic))
        add(READ, lambda: lambda: everything.sum())
        for name, policy in policies.items():
            add(name, partial(lambda p: ours(full_state(p, batch, dtype, heads), tokens), policy))
        states = ms.backends()
        if states["cuda"] == states["triton"] == "ok":
            add(
                TRITON,
                lambda: _by_triton(ours(full_state(policies[TOVA], batch, dtype, heads), tokens)),
            )
        for name, make in _peers(shape, traffic, dtype, compiled).items():
            add(name, partial(lambda make: make(keys.clone(), values.clone(), tokens), make))
    return replays, results, traffic, error


@torch.no_grad()
def _step_row(
    gpu: Gpu, heads: Heads, shape: Shape, dtype: torch.dtype, seconds: float, full: bool
) -> dict[str, Any]:
    torch._dynamo.reset()
    batch, slots = shape
    compiled = full or (heads == GROUPED and shape in COMPILED and dtype == torch.bfloat16)
    replays, results, traffic, error = _step_calls(gpu, heads, shape, dtype, compiled)
    for name, taken in gpu.interleaved(replays, seconds).items():
        results[name]["time"] = taken
    return {
        "heads": [heads.query, heads.kv, heads.dim],
        "batch": batch,
        "slots": slots,
        "dtype": name_of(dtype),
        "traffic": traffic,
        "error": error,
        "competitors": results,
    }


def run(gpu: Gpu, seconds: float, full: bool) -> Entries:
    """The L2 emptied before each repetition: of 32 layers, each finds the states of another."""
    shapes = _FULL_SHAPES if full else SHAPES
    cases = [(GROUPED, shape, torch.bfloat16) for shape in shapes]
    cases += [(heads, shape, torch.bfloat16) for heads, shape in OTHERS]
    cases += [(GROUPED, shape, torch.float32) for shape in shapes[2:4]]
    rows: list[dict[str, Any]] = []
    for heads, shape, dtype in cases:
        batch, slots = shape
        rows.append(_step_row(gpu, heads, shape, dtype, seconds, full))
        label = f"decode step {name_of(dtype)} {batch}×{slots:,}, {heads.query}:{heads.kv} heads"
        say_times(label, rows[-1]["competitors"], TOVA)
        yield {"steps": rows}
        release()


# A decoder.


class _Layer:
    """Attention, by `attend`, and a gated perceptron, with weights of their own."""

    def __init__(self, attend: Attend, width: int, inner: int):
        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16) * shape[1] ** -0.5

        self.attend = attend
        self.to_qkv, self.to_out = weight(3 * width, width), weight(width, width)
        self.up, self.down = weight(2 * inner, width), weight(width, inner)

    def __call__(self, x: Tensor) -> Tensor:
        y = rms_norm(x, x.shape[-1:])
        q, k, v = (y @ self.to_qkv.T).unflatten(-1, (3, -1, MULTI_HEAD.dim)).unbind(1)
        x = x + self.attend(q, k, v).flatten(1) @ self.to_out.T
        gate, up = (rms_norm(x, x.shape[-1:]) @ self.up.T).chunk(2, -1)
        return x + (silu(gate) * up) @ self.down.T


def _full_cache(batch: int, heads: int, slots: int) -> tuple[Attend, int]:
    """Attention to all tokens; the last slot stands for the token that has just come."""
    keys = torch.randn(batch, heads, slots, MULTI_HEAD.dim, dtype=torch.bfloat16)
    values = keys.clone()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[:, :, -1], values[:, :, -1] = k, v
        return scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]

    return attend, 2 * keys.numel() * keys.element_size()


def _bounded(batch: int, heads: int, slots: int) -> tuple[Attend, int]:
    shape = Heads(heads, heads)
    state = full_state(ms.Policy.tova(slots), batch, torch.bfloat16, shape)
    return lambda q, k, v: ms.attend_evict(q, k, v, state), state.nbytes


def _decode(
    gpu: Gpu, layers: Sequence[_Layer], make: Callable[..., Any], batch: int, slots: int
) -> tuple[Call, bool, int]:
    """One token through all layers, whether it is a graph, and the bytes of the caches."""
    total = 0
    for layer in layers:
        layer.attend, size = make(batch, layer.to_out.shape[0] // MULTI_HEAD.dim, slots)
        total += size
    x = torch.randn(batch, layers[0].to_out.shape[0], dtype=torch.bfloat16)

    def token() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    token()
    return (*gpu.captured(token), total)


@torch.no_grad()
def run_decoding(
    gpu: Gpu,
    seconds: float,
    layers: int = _LAYERS,
    width: int = _WIDTH,
    inner: int = _INNER,
    context: int = _CONTEXT,
    batches: Sequence[int] = _BATCHES,
) -> Entries:
    """Tokens a second at every batch that fits in memory, all tokens kept or a fraction."""
    contenders: dict[str, tuple[Callable[..., Any], int]] = {"full cache": (_full_cache, context)}
    for fraction in _FRACTIONS:
        contenders[f"TOVA, 1/{fraction} of it"] = (_bounded, context // fraction)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    settings = {"layers": layers, "width": width, "inner": inner, "context": context}
    with gpu.device:
        stack = [_Layer(lambda q, k, v: v, width, inner) for _ in range(layers)]
        for (name, (make, slots)), batch in itertools.product(contenders.items(), batches):
            row: dict[str, Any] = {"name": name, "slots": slots, "batch": batch}
            try:
                replay, row["graph"], row["bytes"] = _decode(gpu, stack, make, batch, slots)
                taken = gpu.interleaved({name: replay}, seconds, cold=False)[name]
                row |= {"time": taken, "tokens_per_second": batch / taken["median"]}
                del replay
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            for layer in stack:
                layer.attend = lambda q, k, v: v
            release()
            rows.append(row)
            said = row.get("failed") or f"{row['tokens_per_second']:,.0f} tokens/s"
            say(f"decoding {name} batch {batch}: {said}")
            yield {"decoding": {**settings, "rows": rows}}
