"""Scans over ranks: real processes, gloo, against the same call in one process."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SCANS, Scan, norm_error, reference
from torch import Tensor
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
        cu_seqlens = torch.tensor([0, *itertools.accumulate(cuts(time, count))])
    inputs = scan.inputs(batch, time, channels, dtype)
    h0 = torch.randn(count, channels, dtype=torch.promote_types(dtype, torch.float32))
    of_h = torch.randn(batch, time, channels, dtype=torch.float64)
    of_last = torch.randn(ranks, count, channels, dtype=torch.float64)
    options["cu_seqlens"] = cu_seqlens

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
    flags = itertools.product([False, True], repeat=4)
    for scan, (packed, reverse, return_state, pair) in itertools.product(SCANS, flags):
        group = pairs[rank // 2] if pair else None
        _seeded(seed, scan.name, packed, reverse, return_state, pair)
        for length in (0, 1, random.randint(2, 30)):
            options = {"packed": packed, "reverse": reverse, "return_state": return_state}
            compare(scan, length, 5, torch.float64, 1e-12, group, **options)


def test_every_op_on_two_and_four_ranks(run: Any) -> None:
    run(partial(_every_op, seed=random.randrange(2**31)))


def _many_channels(rank: int, seed: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for scan in SCANS:
        for packed, reverse in itertools.product([False, True], repeat=2):
            _seeded(seed, scan.name, packed, reverse)
            options = {"packed": packed, "reverse": reverse, "return_state": True}
            compare(scan, 50, 700, torch.float32, 1e-6, mesh, **options)
            compare(scan, 50, 3, torch.bfloat16, 2e-2, **options)


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
        with pytest.raises(NotImplementedError, match="no second derivatives over ranks"):
            torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match="cu_seqlens to end at T = 6, got 7"):
        distributed.linear_scan(x, x, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"h0 of shape \(1, 4\), got \(2, 4\)"):
        distributed.linear_scan(x, x, torch.zeros(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        gate, candidate = torch.randn(2, 1, 3, 4)
        assert distributed.min_gru(gate.bfloat16(), candidate).dtype == torch.float32


def test_compile_reference_and_errors(run: Any) -> None:
    run(_compiled_and_by_the_reference, ranks=2)


def _one_leaves(rank: int) -> None:
    if rank == 0:
        with pytest.raises(RuntimeError, match="min_gru: rank 0 of 2 waited in vain"):
            distributed.min_gru(*torch.randn(2, 1, 3, 4))


def test_a_rank_that_leaves_is_an_error_on_the_others(run: Any) -> None:
    run(_one_leaves, ranks=2)


def _one_hangs(rank: int) -> None:
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="min_gru: rank 0 of 2 waited in vain"):
            distributed.min_gru(*torch.randn(2, 1, 3, 4))
        assert time.monotonic() - start < 30
    else:
        time.sleep(4)


def test_a_rank_that_hangs_is_an_error_on_the_others(run: Any) -> None:
    run(_one_hangs, ranks=2, timeout=2.0)


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
