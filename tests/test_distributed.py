"""Scans over ranks: real processes, gloo, against the same call in one process."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scans import SCANS, Scan, norm_error, reference
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import msrnn_ops as ms
from msrnn_ops import distributed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def over_ranks(scan: Scan) -> Callable[..., Any]:
    """The function of msrnn_ops.distributed in the place of that of msrnn_ops."""
    if isinstance(scan.function, partial):
        function = getattr(distributed, scan.function.func.__name__)
        return partial(function, **scan.function.keywords)
    return getattr(distributed, scan.function.__name__)


def cuts(total: int, parts: int) -> list[int]:
    """Random sizes, some of them 0, that add up to the total."""
    edges = [0, *sorted(random.randint(0, total) for _ in range(parts - 1)), total]
    return [end - start for start, end in itertools.pairwise(edges)]


def tied(total: Tensor, leaves: list[Tensor]) -> Tensor:
    """The total, which now depends on all leaves, at T = 0 too."""
    return total + sum(0 * x.double().sum() for x in leaves)


def compare(
    scan: Scan,
    time: int,
    channels: int,
    dtype: torch.dtype,
    tolerance: float,
    group: Any = None,
    **options: Any,
) -> None:
    """Values and gradients of every rank's share, with an h0 and, if returned, the last state."""
    ours = group.get_group() if isinstance(group, DeviceMesh) else group
    rank, ranks = dist.get_rank(ours), dist.get_world_size(ours)
    packed = options.pop("packed")
    shares = cuts(time, ranks)
    batch, cu_seqlens, count = 2, None, 2
    if packed:
        batch, count = 1, 6
        outside = random.choice([0, time // 5])  # steps that no sequence covers, at both ends
        lengths = cuts(time - 2 * outside, count)
        cu_seqlens = torch.tensor([outside, *itertools.accumulate(lengths, initial=outside)][1:])
    inputs = scan.inputs(batch, time, channels, dtype)
    h0 = torch.randn(count, channels, dtype=torch.promote_types(dtype, torch.float32))
    of_h = torch.randn(batch, time, channels, dtype=torch.float64)
    of_last = torch.randn(ranks, count, channels, dtype=torch.float64)
    options["cu_seqlens"] = cu_seqlens
    if random.random() < 0.5:
        options["resets"] = torch.rand(batch, time) < random.choice([0.05, 0.5])

    whole = [x.double().requires_grad_() for x in (*inputs, h0)]
    with reference():
        exact_h, exact_last = scan(*whole, **options | {"return_state": True})
    total = (exact_h * of_h).sum()
    if options["return_state"]:
        total = total + (exact_last * of_last.sum(0)).sum()
    exact = torch.autograd.grad(tied(total, whole), whole)

    first = sum(shares[:rank])
    here = slice(first, first + shares[rank])
    mine = [x[:, here].clone().requires_grad_() for x in inputs]
    mine.append(h0.clone().requires_grad_())
    if "resets" in options:
        options["resets"] = options["resets"][:, here]
    returned = over_ranks(scan)(*mine, **options, group=group)
    h, last = returned if options["return_state"] else (returned, None)
    total = (h * of_h[:, here]).sum()
    if last is not None:
        assert last.dtype == h0.dtype
        total = total + (last * of_last[rank]).sum()
        everywhere = [torch.empty_like(last) for _ in range(ranks)]
        dist.all_gather(everywhere, last.detach(), group=ours)
        assert all(torch.equal(last, other) for other in everywhere)
        assert norm_error(last.detach(), exact_last) < tolerance
    *grads, grad_h0 = torch.autograd.grad(tied(total, mine), mine)
    dist.all_reduce(grad_h0, group=ours)
    assert norm_error(grad_h0, exact[-1]) < tolerance
    assert h.dtype == dtype
    assert norm_error(h.detach(), exact_h[:, here]) < tolerance
    for x, truth in zip(grads, exact, strict=False):
        assert x.dtype == dtype
        assert norm_error(x, truth[:, here]) < tolerance


def _seeded(*key: object) -> None:
    """The same numbers on every rank."""
    random.seed(repr(key))
    torch.manual_seed(random.randrange(2**31))


def _every_op(rank: int, seed: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    flags = itertools.product([False, True], repeat=3)
    for scan, (packed, reverse, return_state) in itertools.product(SCANS, flags):
        _seeded(seed, scan.name, packed, reverse, return_state)
        group = random.choice([None, pairs[rank // 2]])
        for length in (0, 1, random.randint(2, 30)):
            options = {"packed": packed, "reverse": reverse, "return_state": return_state}
            compare(scan, length, 5, torch.float64, 1e-12, group, **options)
    _stays_where_it_is(rank)
    _overflow(rank)


def _stays_where_it_is(rank: int) -> None:
    """A NaN in one packed sequence, in a gradient of another: four steps a rank."""
    cu_seqlens = torch.tensor([0, 6, 16])
    mine = slice(4 * rank, 4 * rank + 4)
    for scan, reverse in itertools.product(SCANS, [False, True]):
        _seeded(scan.name, reverse)
        inputs = scan.inputs(1, 16, 3, torch.float64)
        inputs[-1][:, 1 if not reverse else 14] = torch.nan
        weight = torch.ones(1, 16, 3, dtype=torch.float64)
        weight[:, 14 if not reverse else 1] = torch.inf
        options = {"cu_seqlens": cu_seqlens, "reverse": reverse, "return_state": True}
        found = []
        for function, part in ((scan, slice(None)), (over_ranks(scan), mine)):
            leaves = [x[:, part].clone().requires_grad_() for x in inputs]
            h, last = function(*leaves, **options)
            grads = torch.autograd.grad(h, leaves, weight[:, part], materialize_grads=True)
            found.append(
                (last, *((h, *grads) if part == mine else [x[:, mine] for x in (h, *grads)]))
            )
        for expected, x in zip(*found, strict=True):
            torch.testing.assert_close(x, expected, equal_nan=True)


def _overflow(rank: int) -> None:
    """Decays whose product is beyond all numbers, of states that are 0."""
    a = torch.full((1, 800, 1), 2.0)
    b = torch.zeros(1, 800, 1)
    b[:, -1] = 1
    mine = slice(200 * rank, 200 * rank + 200)
    h, last = distributed.linear_scan(a[:, mine], b[:, mine], return_state=True)
    assert torch.equal(h, b[:, mine])
    assert torch.equal(last, torch.ones(1, 1))


def test_every_op_on_two_and_four_ranks(run: Any) -> None:
    run(partial(_every_op, seed=random.randrange(2**31)))


def _many_channels(rank: int, seed: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for scan in SCANS:
        for packed, reverse in itertools.product([False, True], repeat=2):
            _seeded(seed, scan.name, packed, reverse)
            options = {"packed": packed, "reverse": reverse, "return_state": True}
            compare(scan, 50, 1101, torch.float32, 1e-6, mesh, **options)
            compare(scan, 50, 3, torch.bfloat16, 2e-2, **options)


@pytest.mark.slow
def test_more_channels_than_go_at_once_and_other_dtypes(run: Any) -> None:
    run(partial(_many_channels, seed=random.randrange(2**31)), ranks=2)


def _compiled_and_by_the_reference(rank: int) -> None:
    _seeded()
    cu_seqlens = torch.tensor([0, 1, 4, 4, 6])
    for scan in (scan for scan in SCANS if scan.name in ("log_scan", "min_gru", "min_lstm_joint")):
        inputs = [x[:, 3 * rank :][:, :3] for x in scan.inputs(1, 6, 4, torch.float64)]
        leaves = [x.clone().requires_grad_() for x in inputs]
        function = partial(over_ranks(scan), return_state=True)

        def loss(*x: Tensor, function: Any = function, cu_seqlens: Any = None) -> Tensor:
            h, last = function(*x, cu_seqlens=cu_seqlens)
            return h.square().sum() + last.sum()

        for packed in (None, cu_seqlens):
            call = partial(loss, cu_seqlens=packed)
            expected = torch.autograd.grad(call(*leaves), leaves)
            torch.compiler.reset()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
                assert torch.equal(x, y)
            with ms.use_backend("reference"):
                found = torch.autograd.grad(call(*leaves), leaves)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y)
            plain = partial(over_ranks(scan), cu_seqlens=packed)  # some ranks could do without
            with torch.no_grad():
                compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
                assert torch.equal(compiled(*inputs), plain(*inputs))
        with pytest.raises(NotImplementedError, match="no second derivatives over ranks"):
            torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    x = torch.randn(1, 3, 4, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def last_on_one_rank(x: Tensor) -> Tensor:
        options: Any = {"cu_seqlens": cu_seqlens, "return_state": True}
        h, last = distributed.linear_scan(x, 2 * x, **options)
        return h.sum() + last.sum() if rank else h.sum()

    torch.compiler.reset()
    last_on_one_rank(x).backward()
    leaf = x.detach().clone().requires_grad_()
    h, last = distributed.linear_scan(leaf, 2 * leaf, cu_seqlens=cu_seqlens, return_state=True)
    (h.sum() + rank * last.sum()).backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward mode"):
        distributed.linear_scan(forward_ad.make_dual(leaf, leaf), leaf)
    with pytest.raises(NotImplementedError, match=r"no torch\.func"):
        torch.func.grad(lambda x: distributed.linear_scan(x, x).sum())(leaf)
    x = x.detach()
    with pytest.raises(ValueError, match="cu_seqlens within 0 to T = 6, got 0 to 7"):
        distributed.linear_scan(x, x, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"h0 of shape \(1, 4\), got \(2, 4\)"):
        distributed.linear_scan(x, x, torch.zeros(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        gate, candidate = torch.randn(2, 1, 3, 4)
        assert distributed.min_gru(gate.bfloat16(), candidate).dtype == torch.float32


@pytest.mark.slow
def test_compile_reference_and_errors(run: Any) -> None:
    run(_compiled_and_by_the_reference, ranks=2)


def _one_leaves(rank: int) -> None:
    if rank == 0:
        with pytest.raises(RuntimeError, match="min_gru: rank 0 of 2 waited in vain"):
            distributed.min_gru(*torch.randn(2, 1, 3, 4))


@pytest.mark.slow
def test_a_rank_that_leaves_is_an_error_on_the_others(run: Any) -> None:
    run(_one_leaves, ranks=2)


def _one_hangs(rank: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    distributed.min_gru(*torch.randn(2, 1, 3, 4), group=group)
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="min_gru: rank 0 of 2 waited in vain"):
            distributed.min_gru(*torch.randn(2, 1, 3, 4), group=group)
        assert time.monotonic() - start < 60
    else:
        time.sleep(6)


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_on_the_others(run: Any) -> None:
    run(_one_hangs, ranks=2)


def _alone(rank: int) -> None:
    for scan in SCANS:
        inputs = scan.inputs(2, 7, 4, torch.float32)
        found, expected = over_ranks(scan)(*inputs), scan(*inputs)
        assert torch.equal(found, expected)


def test_one_rank_calls_the_op_itself(run: Any) -> None:
    run(_alone, ranks=1)


def test_without_process_groups() -> None:
    with pytest.raises(RuntimeError, match=r"linear_scan: expected torch\.distributed"):
        distributed.linear_scan(torch.randn(1, 3, 4), torch.randn(1, 3, 4))


def _policies() -> Iterator[ms.Policy]:
    for scope in ("layer", "head"):
        yield ms.Policy.tova(6, scope, sinks=1)
        yield ms.Policy.h2o(6, scope=scope)
    yield ms.Policy.window_sinks(6, 2)


def _state(policy: ms.Policy, kv_heads: int, dtype: torch.dtype) -> ms.MultiState:
    return ms.MultiState(policy, batch=3, kv_heads=kv_heads, head_dim=8, dtype=dtype)


def _same_state(state: ms.MultiState, whole: ms.MultiState, heads: slice) -> None:
    groups = slice(None) if state.policy.scope == "layer" else heads
    for name in ("position", "free", "last_evicted"):
        assert torch.equal(getattr(state, name), getattr(whole, name)[:, groups])
    assert torch.equal(state.seen, whole.seen)
    torch.testing.assert_close(state.score, whole.score[:, groups])
    kept = (whole.position[:, groups] >= 0).expand(-1, state.keys.shape[1], -1)
    assert torch.equal(state.keys[kept], whole.keys[:, heads][kept])
    assert torch.equal(state.values[kept], whole.values[:, heads][kept])


def _sharded_heads(rank: int, seed: int) -> None:
    ranks = dist.get_world_size()
    for policy, shared, dtype in itertools.product(
        _policies(), (False, True), (torch.float32, torch.bfloat16)
    ):
        if shared and policy.scope == "head":
            continue
        _seeded(seed, policy, shared, dtype)
        kv_heads = 1 if shared else 4  # one for the query heads of all ranks
        whole = _state(policy, kv_heads, dtype)
        share = 8 // ranks
        queries = slice(share * rank, share * (rank + 1))
        share = kv_heads // ranks
        heads = slice(None) if shared else slice(share * rank, share * (rank + 1))
        state = _state(policy, 1 if shared else share, dtype)
        for tokens in (9, *[0] * 8, 5, 0):
            q, k, v = (
                torch.randn(3, n, *([tokens] if tokens else []), 8, dtype=dtype)
                for n in (8, kv_heads, kv_heads)
            )
            ours = (q[:, queries], k[:, heads], v[:, heads])
            if tokens:
                valid = torch.arange(tokens) >= torch.tensor([[0], [2], [tokens]])
                expected = ms.attend_prompt(q, k, v, whole, valid=valid)
                out = distributed.attend_prompt(*ours, state, valid=valid)
            else:
                expected = ms.attend_evict(q, k, v, whole)
                out = distributed.attend_evict(*ours, state)
            torch.testing.assert_close(out, expected[:, queries])
            _same_state(state, whole, heads)


def _heads_otherwise(rank: int) -> None:
    """Compiled; by the reference; with a gradient; wrong; and without the others."""
    policy = ms.Policy.tova(2)
    heads = slice(2 * rank, 2 * rank + 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor, state: ms.MultiState) -> Tensor:
        return distributed.attend_evict(q, k, v, state)

    for backend, step in (("cpu", compiled), ("reference", distributed.attend_evict)):
        _seeded(backend)
        whole, state = _state(policy, 4, torch.float32), _state(policy, 2, torch.float32)
        with ms.use_backend(backend):
            prompt = torch.randn(3, 3, 4, 7, 8)
            expected = ms.attend_prompt(*prompt, whole)
            out = distributed.attend_prompt(*prompt[:, :, heads], state)
            torch.testing.assert_close(out, expected[:, heads])
            for _ in range(4):
                _same_state(state, whole, heads)
                q, k, v = torch.randn(3, 3, 4, 8)
                expected = ms.attend_evict(q, k, v, whole)
                out = step(q[:, heads], k[:, heads], v[:, heads], state)
                torch.testing.assert_close(out, expected[:, heads])
    with pytest.raises(RuntimeError, match="attend_prompt changes the state in place"):
        distributed.attend_prompt(*torch.randn(3, 3, 2, 5, 8, requires_grad=True), state)
    with pytest.raises(ValueError, match="attend_prompt: expected key-value heads of 2"):
        distributed.attend_prompt(*torch.randn(3, 3, 4, 5, 8), state)
    with torch.inference_mode():
        distributed.attend_prompt(*torch.randn(3, 3, 2, 5, 8), state)
    before = state.position.clone()
    if rank == 0:
        with pytest.raises(RuntimeError, match="attend_evict: rank 0 of 2 waited in vain"):
            distributed.attend_evict(*torch.randn(3, 3, 2, 8), state)
        assert int((state.position != before).sum()) == 3  # the token waits


@pytest.mark.slow
def test_heads_over_ranks_drop_what_one_device_drops(run: Any) -> None:
    run(partial(_sharded_heads, seed=random.randrange(2**31)), ranks=4)
    run(partial(_sharded_heads, seed=random.randrange(2**31)), ranks=2)


@pytest.mark.slow
def test_heads_over_ranks_compiled_by_the_reference_and_errors(run: Any) -> None:
    run(_heads_otherwise, ranks=2)
