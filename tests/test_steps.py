"""Layers and blocks that are told which steps are real and where sequences begin."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.utils.rnn import pack_sequence

import msrnn_ops as ms
from msrnn_ops.nn import BlockState

WIDTH = 4
MODULES: dict[str, Callable[[], Any]] = {
    "gru": lambda: ms.nn.MinGRU(WIDTH, 5, 2, batch_first=True),
    "gru, both directions": lambda: ms.nn.MinGRU(WIDTH, 5, 2, bidirectional=True, batch_first=True),
    "lstm": lambda: ms.nn.MinLSTM(WIDTH, 5, activation="identity", batch_first=True),
    "learnable": lambda: ms.nn.MinLSTM(WIDTH, 5, 2, learnable_h0=True, batch_first=True),
    "block": lambda: ms.nn.MinRNNBlock(WIDTH, expansion=1.5),
    "block, lstm": lambda: ms.nn.MinRNNBlock(WIDTH, cell="lstm", conv=3, mlp=0),
    "block, pointwise": lambda: ms.nn.MinRNNBlock(WIDTH, conv=1),
    "block, no convolution": lambda: ms.nn.MinRNNBlock(WIDTH, conv=0),
}
modules = pytest.mark.parametrize("name", MODULES)


def made(name: str) -> Any:
    module = MODULES[name]().double()
    for parameter in module.parameters():
        if parameter.dim() == 1:  # learnt states are not 0, either
            torch.nn.init.normal_(parameter)
    return module


def draw_state(module: Any, rows: int) -> Any:
    if isinstance(module, ms.nn.MinRNNBlock):
        taps = 0 if module.conv is None else module.conv.kernel_size[0] - 1
        wide = torch.float64
        h = torch.randn(rows, module.rnn.hidden_size, dtype=wide)
        return BlockState(h, torch.randn(rows, taps, WIDTH, dtype=wide))
    count = module.num_layers * (1 + module.bidirectional)
    return torch.randn(count, rows, module.hidden_size, dtype=torch.float64)


def row_of(state: Any, n: int) -> Any:
    if state is None:
        return None
    if isinstance(state, BlockState):
        return BlockState(*(x[n : n + 1] for x in state))
    return state[:, n : n + 1]


def flat(state: Any) -> list[Tensor]:
    """h and inputs of a block, h of a layer, as tensors with rows first."""
    if isinstance(state, BlockState):
        return list(state)
    return [(state[0] if isinstance(state, tuple) else state).transpose(0, 1)]


def call(module: Any, x: Any, state: Any = None, **steps: Any) -> tuple[Any, Any]:
    if isinstance(module, ms.nn.MinRNNBlock):
        return module(x, state, return_state=True, **steps)
    return module(x, state, **steps)


def gradient(module: Any, x: Tensor, outputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    leaves = [x, *module.parameters()]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True))


def assert_same(got: list[Tensor], right: list[Tensor]) -> None:
    for x, y in zip(got, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@modules
@pytest.mark.parametrize("with_state", [False, True], ids=["from 0", "with a state"])
@pytest.mark.parametrize("where", ["left", "right", "holes", "all", "none"])
def test_what_is_not_valid_is_not_there(name: str, with_state: bool, where: str) -> None:
    """Outputs, states and gradients are those of the real steps alone, whatever padding holds."""
    module = made(name)
    valid = torch.ones(3, 8, dtype=torch.bool)
    counts = torch.tensor([3, 8, 1])[:, None]
    step = torch.arange(8)
    if where == "left":
        valid = step >= 8 - counts
    elif where == "right":
        valid = step < counts
    elif where == "holes":
        valid = torch.rand(3, 8) < 0.5
    elif where == "none":
        valid = torch.zeros_like(valid)
    x = torch.randn(3, 8, WIDTH, dtype=torch.float64)
    x[~valid] = torch.tensor([torch.nan, torch.inf, 1e30, 0.0], dtype=torch.float64)
    x.requires_grad_()
    state = draw_state(module, 3) if with_state else None
    y, after = call(module, x, state, valid=valid)
    outputs, right = [y, *flat(after)], []
    for n in range(3):
        mine, last = call(module, x[n, valid[n]][None], row_of(state, n))
        whole = torch.zeros(8, mine.shape[2], dtype=torch.float64)
        whole[valid[n]] = mine[0]
        right.append([whole[None], *flat(last)])
    expected = [torch.cat(parts) for parts in zip(*right, strict=True)]
    assert_same(outputs, expected)
    weights = [torch.randn_like(part) for part in outputs]
    assert_same(gradient(module, x, outputs, weights), gradient(module, x, expected, weights))


@modules
@pytest.mark.parametrize("with_state", [False, True], ids=["from 0", "with a state"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_a_reset_starts_afresh(name: str, with_state: bool, rate: float) -> None:
    """As if each piece between resets were a call of its own, from states of 0."""
    module = made(name)
    resets = torch.rand(2, 9) < rate
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    state = draw_state(module, 2) if with_state else None
    y, after = call(module, x, state, resets=resets)
    right, last = [], []
    for n in range(2):
        borders = sorted({0, 9, *resets[n].nonzero()[:, 0].tolist()})
        pieces, ends = [], []
        for begin, end in itertools.pairwise(borders):
            # A direction starts from its own state only at its own end of the row.
            fresh = draw_state(module, 1)
            fresh = (
                BlockState(*map(torch.zeros_like, fresh))
                if isinstance(fresh, BlockState)
                else torch.zeros_like(fresh)
            )
            own = row_of(state, n)
            if own is None and getattr(module, "learnable_h0", False):
                own = torch.stack([getattr(module, f"h0_l{i}") for i in range(2)])[:, None]
            entering = own if begin == 0 and not resets[n, 0] and own is not None else fresh
            if getattr(module, "bidirectional", False):
                entering = fresh.clone()
                if own is not None and begin == 0 and not resets[n, 0]:
                    entering[0::2] = own[0::2]
                if own is not None and end == 9:
                    entering[1::2] = own[1::2]
            piece, state_after = call(module, x[n : n + 1, begin:end], entering)
            pieces.append(piece)
            ends.append(flat(state_after))
        final = [part.clone() for part in ends[-1]]
        if getattr(module, "bidirectional", False):
            final[0][:, 1::2] = ends[0][0][:, 1::2]
        right.append(torch.cat(pieces, 1))
        last.append(final)
    expected = [torch.cat(right), *(torch.cat(parts) for parts in zip(*last, strict=True))]
    outputs = [y, *flat(after)]
    assert_same(outputs, expected)
    weights = [torch.randn_like(part) for part in outputs]
    assert_same(gradient(module, x, outputs, weights), gradient(module, x, expected, weights))


@modules
def test_a_step_that_is_not_valid_resets_nothing(name: str) -> None:
    """And the first real step of a row is its first step, in both directions."""
    module = made(name)
    valid, resets = torch.rand(3, 8) < 0.6, torch.rand(3, 8) < 0.4
    valid[0], resets[0, 2] = torch.arange(8) > 1, True
    x = torch.randn(3, 8, WIDTH, dtype=torch.float64)
    state = draw_state(module, 3)
    y, after = call(module, x, state, valid=valid, resets=resets)
    for n in range(3):
        real = valid[n]
        mine, last = call(module, x[n, real][None], row_of(state, n), resets=resets[n, real][None])
        torch.testing.assert_close(y[n, real], mine[0], rtol=1e-9, atol=1e-9)
        assert_same([part[n : n + 1] for part in flat(after)], flat(last))


@modules
@pytest.mark.parametrize("with_state", [False, True], ids=["from 0", "with a state"])
@pytest.mark.parametrize(
    "ends", [[0, 4, 4, 10], [2, 2, 3, 7], [0, 0, 0, 0], [10, 10, 10, 10]], ids=str
)
def test_packed_sequences_are_alone(name: str, with_state: bool, ends: list[int]) -> None:
    """And steps that none of them covers are zeros, whatever they hold."""
    module = made(name)
    x = torch.randn(1, 10, WIDTH, dtype=torch.float64)
    x[:, : ends[0]] = x[:, ends[-1] :] = torch.nan
    x.requires_grad_()
    state = draw_state(module, 3) if with_state else None
    y, after = call(module, x, state, cu_seqlens=torch.tensor(ends))
    outputs = [y, *flat(after)]
    pieces, last = [torch.zeros_like(y[:, : ends[0]])], []
    for n, (begin, end) in enumerate(itertools.pairwise(ends)):
        piece, state_after = call(module, x[:, begin:end], row_of(state, n))
        pieces.append(piece)
        last.append(flat(state_after))
    pieces.append(torch.zeros_like(y[:, ends[-1] :]))
    expected = [torch.cat(pieces, 1), *(torch.cat(parts) for parts in zip(*last, strict=True))]
    assert_same(outputs, expected)
    weights = [torch.randn_like(part) for part in outputs]
    assert_same(gradient(module, x, outputs, weights), gradient(module, x, expected, weights))


@modules
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["any order", "sorted"])
def test_packed_and_nested_inputs(name: str, enforce_sorted: bool) -> None:
    module = made(name)
    lengths = (5, 4, 1) if enforce_sorted else (3, 5, 1)
    rows = [torch.randn(n, WIDTH, dtype=torch.float64) for n in lengths]
    state = draw_state(module, 3)
    right = [call(module, row[None], row_of(state, n)) for n, row in enumerate(rows)]
    last = [torch.cat(parts) for parts in zip(*(flat(s) for _, s in right), strict=True)]
    packed, after = call(module, pack_sequence(rows, enforce_sorted=enforce_sorted), state)
    expected = pack_sequence([y[0] for y, _ in right], enforce_sorted=enforce_sorted)
    assert_same([packed.data, *flat(after)], [expected.data, *last])
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    y, after = call(module, nested, state)
    assert y.is_nested
    assert_same([*y.unbind(), *flat(after)], [*(x[0] for x, _ in right), *last])


def test_time_major_masks_lie_as_the_input() -> None:
    layer = ms.nn.MinGRU(WIDTH, 5)
    x, valid, resets = torch.randn(7, 2, WIDTH), torch.rand(7, 2) < 0.7, torch.rand(7, 2) < 0.3
    y, h = layer(x, valid=valid, resets=resets)
    layer.batch_first = True
    right, last = layer(x.transpose(0, 1), valid=valid.t(), resets=resets.t())
    assert torch.equal(y.transpose(0, 1), right) and torch.equal(h, last)
    alone, one = layer(x[:, 0], valid=valid[:, 0], resets=resets[:, 0])
    torch.testing.assert_close(alone, right[0])
    torch.testing.assert_close(one, last[:, 0])


def test_compiled_and_exported_with_masks() -> None:
    block, x = ms.nn.MinRNNBlock(WIDTH), torch.randn(2, 6, WIDTH)
    valid, resets = torch.rand(2, 6) < 0.7, torch.rand(2, 6) < 0.3
    right = block(x, valid=valid, resets=resets)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, valid=valid, resets=resets), right)
    ends = torch.tensor([0, 2, 5])
    packed = block(x[:1], cu_seqlens=ends)
    torch.testing.assert_close(compiled(x[:1], cu_seqlens=ends), packed)
    program = torch.export.export(block, (x[:1],), {"cu_seqlens": ends})
    torch.testing.assert_close(program.module()(x[:1], cu_seqlens=ends), packed)


@pytest.mark.parametrize("name", ["gru", "lstm", "block"])
def test_wrong_steps(name: str) -> None:
    module, x = MODULES[name](), torch.randn(2, 6, WIDTH)
    mask, ends = torch.ones(2, 6, dtype=torch.bool), torch.tensor([0, 6])
    wrong: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "valid in torch.bool, got torch.int64", x, {"valid": mask.long()}),
        (TypeError, "valid to be a tensor, got list", x, {"valid": [True]}),
        (
            ValueError,
            r"resets of shape \(B, T\) = \(2, 6\), got \(2, 5\)",
            x,
            {"resets": mask[:, 1:]},
        ),
        (
            ValueError,
            "valid or cu_seqlens, got both",
            x[:1],
            {"valid": mask[:1], "cu_seqlens": ends},
        ),
        (ValueError, r"cu_seqlens of shape \(N \+ 1,\), got list", x[:1], {"cu_seqlens": [0, 6]}),
        (TypeError, "valid to be a strided tensor", x, {"valid": mask.to_sparse()}),
        *(
            (kind, f"expected {words}", x[:1], {"cu_seqlens": borders})
            for kind, words, borders in [
                (TypeError, "cu_seqlens in int32 or int64, got torch.float32", ends.float()),
                (TypeError, "cu_seqlens to be a strided tensor", ends.to_sparse()),
                (ValueError, "cu_seqlens on the device of input, cpu", ends.to("meta")),
                (ValueError, "cu_seqlens within 0 to T = 6, got 0 to 7", ends + ends // 6),
                (ValueError, "cu_seqlens within 0 to T = 6, got -1 to 5", ends - 1),
                (ValueError, "cu_seqlens not to decrease", torch.tensor([0, 4, 2, 6])),
            ]
        ),
        (ValueError, "B = 1 .*, got B = 2", x, {"cu_seqlens": ends}),
        (
            ValueError,
            "no valid with a PackedSequence",
            pack_sequence([x[0]]),
            {"valid": mask},
        ),
        (
            ValueError,
            "layout=torch.jagged",
            torch.nested.nested_tensor([x[0]], layout=torch.strided),
            {},
        ),
    ]
    for error, words, value, steps in wrong:
        with pytest.raises(error, match=f"^{type(module).__name__}: .*{words}"):
            module(value, **steps)
    if name == "block":
        with pytest.raises(ValueError, match="resets or cu_seqlens, got both"):
            module(x[:1], resets=mask[:1], cu_seqlens=ends)


def test_packed_time_major_has_a_batch_of_one() -> None:
    layer, ends = ms.nn.MinGRU(WIDTH, 5), torch.tensor([0, 2, 6])
    assert layer(torch.randn(6, 1, WIDTH), cu_seqlens=ends)[1].shape == (1, 2, 5)
    assert layer(torch.randn(6, WIDTH), cu_seqlens=ends)[1].shape == (1, 2, 5)
    with pytest.raises(ValueError, match=r"MinGRU: expected B = 1 .*, got B = 6"):
        layer(torch.randn(1, 6, WIDTH), cu_seqlens=ends)
    with pytest.raises(ValueError, match="MinGRU: expected cu_seqlens within 0 to T = 5, got 0 to"):
        layer(torch.randn(5, 1, WIDTH), cu_seqlens=ends)


@pytest.mark.parametrize("name", ["gru", "block"])
def test_masks_are_dtensors_like_the_input(name: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module = distribute_module(MODULES[name](), mesh)
        plain = torch.randn(2, 6, WIDTH), torch.ones(2, 6, dtype=torch.bool)
        x, mask = (distribute_tensor(y, mesh, [Replicate()]) for y in plain)
        with pytest.raises(ValueError, match="valid to be a DTensor like the input, got a plain"):
            module(x, valid=plain[1])
        with pytest.raises(ValueError, match="valid to be a plain tensor like the input, got a DT"):
            MODULES[name]()(plain[0], valid=mask)
    finally:
        dist.destroy_process_group()
