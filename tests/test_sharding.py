"""DTensors in the public functions: real processes, gloo, against the same call in one process.

Shards of rows, channels and heads are computed as they are in the whole: results equal bit by bit.
"""

from __future__ import annotations

import copy
import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scans import SCANS, Scan
from torch import Tensor, nn

import msrnn_ops as ms
from msrnn_ops import distributed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Placement,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from msrnn_ops.distributed import distribute_state

POLICIES = [
    ms.Policy.tova(4),
    ms.Policy.tova(4, "head", sinks=1),
    ms.Policy.h2o(4),
    ms.Policy.h2o(4, scope="head"),
    ms.Policy.window_sinks(4, 1),
]


def put(x: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """x, the same on every rank, as a DTensor that is a leaf."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def same(x: Tensor, whole: Tensor, placements: list[Placement]) -> None:
    """x is placed so, and equals the whole, of which this rank looks at its part."""
    assert isinstance(x, DTensor) and list(x.placements) == placements
    assert x.shape == whole.shape and x.dtype == whole.dtype
    part = put(whole.detach(), x.device_mesh, placements).to_local()
    assert torch.equal(x.detach().to_local(), part)


def of_scan(x: Tensor, kinds: tuple[str, ...]) -> list[Placement]:
    """Placements of a tensor (B, T, D) or (B, D)."""
    of = {"whole": Replicate(), "rows": Shard(0), "channels": Shard(x.dim() - 1)}
    return [of[kind] for kind in kinds]


def compare_scan(
    scan: Scan, mesh: DeviceMesh, kinds: tuple[str, ...], packed: bool, reverse: bool, state: bool
) -> None:
    """Values and gradients, from gradients that are placed alike or are whole."""
    batch, count, cu_seqlens = (1, 3, torch.tensor([0, 2, 2, 9])) if packed else (5, 5, None)
    inputs = scan.inputs(batch, 9, 6, torch.float64)
    h0 = [torch.randn(count, 6, dtype=torch.float64)] if state else []
    grads = [torch.randn(batch, 9, 6).double(), torch.randn(count, 6).double()]
    options: Any = {"cu_seqlens": cu_seqlens, "reverse": reverse, "return_state": True}
    if random.random() < 0.5:
        options["resets"] = torch.rand(batch, 9) < 0.3

    whole = [x.requires_grad_() for x in (*inputs, *h0)]
    expected = scan(*whole, **options)
    expected_grads = torch.autograd.grad(expected, whole, grads)

    mine = [put(x.detach(), mesh, of_scan(x, kinds)).requires_grad_() for x in whole]
    if "resets" in options and random.random() < 0.5:  # whole, or placed as the rows are
        rows = [Shard(0) if kind == "rows" else Replicate() for kind in kinds]
        options["resets"] = put(options["resets"], mesh, rows)
    found = scan(*mine, **options)
    given = random.choice([kinds, ("whole",) * len(kinds)])
    given_grads = [put(x, mesh, of_scan(x, given)) for x in grads]
    for x, y in zip(found, expected, strict=True):
        same(x, y, of_scan(y, kinds))
    for x, y in zip(torch.autograd.grad(found, mine, given_grads), expected_grads, strict=True):
        same(x, y, of_scan(y, kinds))


def _scans(rank: int) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [(line, ("whole",)), (line, ("rows",)), (line, ("channels",))]
    cases += [(square, ("rows", "channels")), (square, ("channels", "rows"))]
    for scan, (mesh, kinds), packed in itertools.product(SCANS, cases, (False, True)):
        if (packed and "rows" in kinds) or (scan.joint and "channels" in kinds):
            continue
        reverse, state = (random.choice((False, True)) for _ in range(2))
        compare_scan(scan, mesh, kinds, packed, reverse, state)

    # Placed differently: redistributed, and the gradients belong to the whole.
    gate, candidate, weight = torch.randn(3, 4, 9, 6, dtype=torch.float64)
    h0 = torch.randn(4, 6, dtype=torch.float64)
    whole = [x.requires_grad_() for x in (gate, candidate, h0)]
    h = ms.min_gru(*whole)
    expected = torch.autograd.grad((h * weight).sum(), whole)
    for places in (
        [Shard(0), Shard(0), Replicate()],
        [Shard(2), Replicate(), Shard(0)],
        [Shard(0), Shard(2), Shard(1)],
    ):
        mine = [
            put(x.detach(), line, [p]).requires_grad_() for x, p in zip(whole, places, strict=True)
        ]
        found = ms.min_gru(*mine)
        assert torch.equal(found.full_tensor(), h)
        total = (found * put(weight, line, [Replicate()])).sum()
        for x, y in zip(torch.autograd.grad(total, mine), expected, strict=True):
            assert torch.equal(x.full_tensor(), y)
    parts = [DTensor.from_local(x.detach() * (rank == 1), line, [Partial()]) for x in whole]
    assert torch.equal(ms.min_gru(*parts).full_tensor(), h)
    one_row = [put(x[:1].detach(), line, [Shard(0)]) for x in whole]  # fewer than ranks
    assert torch.equal(ms.min_gru(*one_row).full_tensor(), h[:1])
    second = []
    for leaves in (whole, [put(x.detach(), line, [Shard(0)]).requires_grad_() for x in whole]):
        total = ms.min_gru(*leaves).square().sum()
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in grads), leaves))
    for x, y in zip(*second, strict=True):
        torch.testing.assert_close(y.full_tensor(), x)
    last = ms.min_gru_step(gate[:, 0], candidate[:, 0], h0)
    mine = [
        put(x.detach(), square, [Shard(0), Shard(1)]) for x in (gate[:, 0], candidate[:, 0], h0)
    ]
    same(ms.min_gru_step(*mine), last, [Shard(0), Shard(1)])


def of_state(x: Tensor, label: str, kinds: tuple[str, ...], per_head: bool) -> list[Placement]:
    """Placements of tokens, of a state's tensors and of expiry."""
    decision = label in ("position", "score", "free", "last_evicted", "expiry")
    heads = Replicate() if label == "seen" or (decision and not per_head) else Shard(1)
    of = {"whole": Replicate(), "rows": Shard(0), "heads": heads}
    return [of[kind] for kind in kinds]


def compare_states(policy: ms.Policy, mesh: DeviceMesh, kinds: tuple[str, ...]) -> None:
    """A prompt and tokens until states go, and a sequence with its gradients."""
    state = ms.MultiState(policy, batch=5, kv_heads=4, head_dim=8)
    state.keys.zero_()
    state.values.zero_()
    per_head = policy.scope == "head"
    places = of_state(state.keys, "keys", kinds, per_head)
    mine = distribute_state(state, mesh, places)
    valid = torch.arange(6) >= torch.tensor([[0], [2], [6], [4], [0]])

    def drawn(*time: int) -> tuple[list[Tensor], list[DTensor]]:
        whole = [torch.randn(5, heads, *time, 8) for heads in (8, 4, 4)]
        return whole, [put(x, mesh, places) for x in whole]

    def check() -> None:
        for label, x, y in zip(state.TENSORS, mine.tensors(), state.tensors(), strict=True):
            same(x, y, of_state(y, label, kinds, per_head))

    for step in range(8):
        if step in (0, 5):
            whole, parts = drawn(6)
            expected = ms.attend_prompt(*whole, state, valid=valid)
            same(ms.attend_prompt(*parts, mine, valid=valid), expected, places)
        elif step == 3:
            whole, parts = drawn()
            expected, scores = ms.attend_scores(*whole, state)
            found, parts_of_scores = ms.attend_scores(*parts, mine)
            same(found, expected, places)
            assert ("heads" in kinds and not per_head) == any(
                isinstance(p, Partial) for p in parts_of_scores.placements
            )
            torch.testing.assert_close(parts_of_scores.full_tensor(), scores)
            ms.evict(state, scores)
            ms.evict(mine, parts_of_scores)
        else:
            whole, parts = drawn()
            same(ms.attend_evict(*parts, mine), ms.attend_evict(*whole, state), places)
        check()
    kept = state.kept_positions()
    same(mine.kept_positions(), kept, of_state(kept, "position", kinds, per_head))
    index = torch.tensor([4, 4, 0, 1, 3])
    state.reorder(index)
    mine.reorder(index)
    check()
    mine.reset()
    assert int(mine.seen.full_tensor().sum()) == 0 and int(state.seen.sum()) > 0

    whole, parts = drawn(9)
    weight = torch.randn(5, 8, 9, 8)
    leaves = [[x.requires_grad_() for x in tensors] for tensors in (whole, parts)]
    expected, expiry = ms.attend_sequence(*leaves[0], policy)
    found, found_expiry = ms.attend_sequence(*leaves[1], policy)
    same(found, expected, places)
    same(found_expiry, expiry, of_state(expiry, "expiry", kinds, per_head))
    given = random.choice([places, [Replicate()] * mesh.ndim, [Shard(2)] * mesh.ndim])
    found_grads = torch.autograd.grad(found, leaves[1], put(weight, mesh, given))
    for x, y in zip(found_grads, torch.autograd.grad(expected, leaves[0], weight), strict=True):
        same(x, y, places)
    found, _ = ms.attend_sequence(*leaves[1], policy)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(found.square().sum(), leaves[1], create_graph=True)


def compare_decisions(policy: ms.Policy, mesh: DeviceMesh, kinds: tuple[str, ...]) -> None:
    """Scores of heads on several ranks are summed in another order than those of one process."""
    state = ms.MultiState(policy, batch=5, kv_heads=4, head_dim=8)
    places = of_state(state.keys, "keys", kinds, per_head=False)
    mine = distribute_state(state, mesh, places)
    for _ in range(2 * policy.slots):
        whole = [torch.randn(5, heads, 8) for heads in (8, 4, 4)]
        found = ms.attend_evict(*(put(x, mesh, places) for x in whole), mine)
        torch.testing.assert_close(found.full_tensor(), ms.attend_evict(*whole, state))
        for label in ("position", "free", "seen", "last_evicted"):
            expected = getattr(state, label)
            same(getattr(mine, label), expected, of_state(expected, label, kinds, per_head=False))
        torch.testing.assert_close(mine.score.full_tensor(), state.score)


def _states(rank: int) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for policy in POLICIES:
        for mesh, kinds in (
            (line, ("rows",)),
            (line, ("heads",)),
            (square, ("rows", "heads")),
        ):
            if "heads" in kinds and policy.scope == "layer" and policy.score != "position":
                compare_decisions(policy, mesh, kinds)
            else:
                compare_states(policy, mesh, kinds)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made: Any = {"dtype": torch.float64}
        self.gate, self.candidate = nn.Linear(8, 12, **made), nn.Linear(8, 12, **made)
        self.out = nn.Linear(12, 8, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(ms.min_gru(self.gate(x), self.candidate(x)))


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """The loss, after one step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach()


def same_parameters(model: nn.Module, whole: nn.Module) -> None:
    for x, y in zip(model.parameters(), whole.parameters(), strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y)
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)


def _models(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    rows = slice(2 * (rank // 2), 2 * (rank // 2) + 2)  # of this rank, along "data"
    whole = Model()
    models = [copy.deepcopy(whole) for _ in range(3)]
    loss = trained(whole, x)

    def sharded() -> dict[str, Any]:
        columns = partial(ColwiseParallel, use_local_output=False)
        return {"gate": columns(), "candidate": columns(), "out": RowwiseParallel()}

    tensor_parallel = parallelize_module(models[0], mesh["tensor"], sharded())
    torch.testing.assert_close(trained(tensor_parallel, x), loss)
    same_parameters(tensor_parallel, whole)

    data_parallel = distribute_module(models[1], mesh["data"])
    parts = put(x, mesh["data"], [Shard(0)])
    torch.testing.assert_close(trained(data_parallel, parts), loss)
    same_parameters(data_parallel, whole)

    both = parallelize_module(models[2], mesh["tensor"], sharded())
    fully_shard(both, mesh=mesh["data"])
    both.set_gradient_divide_factor(1.0)  # the loss is a sum
    mine = trained(both, x[rows])
    dist.all_reduce(mine, group=mesh["data"].get_group())
    torch.testing.assert_close(mine, loss)
    same_parameters(both, whole)

    block = ms.nn.MinRNNBlock(8, dtype=torch.float64)
    blocks = copy.deepcopy(block)
    loss = trained(block, x)
    fully_shard(blocks, mesh=mesh["data"])
    blocks.set_gradient_divide_factor(1.0)
    mine = trained(blocks, x[rows])
    dist.all_reduce(mine, group=mesh["data"].get_group())
    torch.testing.assert_close(mine, loss)
    same_parameters(blocks, block)


def _errors_and_compile(rank: int) -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    if rank > 1:
        return
    x, y = torch.randn(2, 4, 4, 12)
    in_time = put(x, mesh, [Shard(1)])
    whole = "expected gate (B, T, D) whole in time, got Shard(dim=1); msrnn_ops.distributed.min_gru"
    with pytest.raises(
        ValueError, match=f"^min_gru: {whole}".replace("(", r"\(").replace(")", r"\)")
    ):
        ms.min_gru(in_time, in_time)
    with ms.use_backend("reference"), pytest.raises(ValueError, match="whole in time"):
        ms.min_gru(in_time, in_time)
    with pytest.raises(ValueError, match=r"linear_scan: expected b .*whole in time"):
        ms.linear_scan(put(x, mesh, [Shard(0)]), in_time)
    with pytest.raises(RuntimeError, match=r"linear_scan: expected a .*whole in time"):
        torch.ops.msrnn_ops.linear_scan(in_time, in_time, None, None, None, False)
    with pytest.raises(
        ValueError, match=r"expected projection, 3 inputs.*msrnn_ops\.min_lstm takes"
    ):
        ms.min_lstm_joint(put(x, mesh, [Shard(2)]))
    with pytest.raises(ValueError, match="expected h0 to be a DTensor on the mesh of gate"):
        ms.min_gru(put(x, mesh, [Shard(0)]), put(y, mesh, [Shard(0)]), torch.zeros(4, 12))
    with ms.use_backend("reference"):
        h = ms.min_gru(put(x, mesh, [Shard(0)]), put(y, mesh, [Shard(0)]))
        assert torch.equal(h.full_tensor(), ms.min_gru(x, y))

    tokens = [torch.randn(4, heads, 8) for heads in (8, 4, 4)]
    by_rows, by_heads = ([put(t, mesh, [Shard(i)]) for t in tokens] for i in (0, 1))
    layer, head = (ms.MultiState(p, batch=4, kv_heads=4, head_dim=8) for p in POLICIES[:2])
    mine = distribute_state(head, mesh, [Shard(1)])
    before = mine.position.full_tensor()
    for wrong, error, words in (
        (by_rows, ValueError, "expected q placed as .*Shard.dim=1.*got .*Shard.dim=0"),
        ([*by_heads[:2], by_rows[2]], ValueError, "expected v placed as"),
        ([put(t, mesh, [Shard(2)]) for t in tokens], ValueError, "expected q placed as"),
        (tokens, RuntimeError, "mixed torch.Tensor and DTensor"),
    ):
        with pytest.raises(error, match=words):
            ms.attend_evict(*wrong, mine)
    with pytest.raises(RuntimeError, match="attend_evict: expected q placed as"):
        numbers = (*head.policy.numbers, 1.0)
        torch.ops.msrnn_ops.attend_evict(*by_rows, None, *mine.tensors(), *numbers)
    some = {"rows": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(ValueError, match="attend_evict: expected rows=None with DTensors"):
        ms.attend_evict(*by_heads, mine, **some)
    with pytest.raises(ValueError, match="reset: expected rows=None with DTensors"):
        mine.reset(**some)
    prompt = [put(torch.randn(6, heads, 8), mesh, [Shard(1)]) for heads in (8, 4, 4)]
    with pytest.raises(ValueError, match="attend_prompt: expected cu_seqlens=None with DTensors"):
        ms.attend_prompt(*prompt, mine, cu_seqlens=torch.tensor([0, 1, 2, 3, 6]))
    with pytest.raises(ValueError, match="expected keys to be a DTensor on the mesh of q"):
        ms.attend_evict(*by_heads, head)
    with ms.use_backend("reference"), pytest.raises(ValueError, match="expected plain tensors"):
        ms.attend_evict(*by_heads, mine)
    assert torch.equal(mine.position.full_tensor(), before)

    shared = distribute_state(layer, mesh, [Shard(1)])
    scores = r"expected whole heads.*msrnn_ops\.distributed\.attend_evict"
    prompt = [put(t[:, :, None].expand(-1, -1, 5, -1), mesh, [Shard(1)]) for t in tokens]
    for call in (
        lambda: ms.attend_prompt(*prompt, shared),
        lambda: ms.attend_sequence(*prompt, layer.policy),
    ):
        with pytest.raises(ValueError, match=scores):
            call()
    with pytest.raises(ValueError, match=r"expected k sharded over rows.*got Shard\(dim=2\)"):
        ms.attend_sequence(*(t.redistribute(placements=[Shard(2)]) for t in prompt), layer.policy)
    with pytest.raises(ValueError, match="expected a state sharded over rows"):
        distribute_state(head, mesh, [Shard(2)])
    with pytest.raises(ValueError, match="expected 1 placements"):
        distribute_state(head, mesh, [Shard(0), Shard(1)])
    with pytest.raises(TypeError, match="expected state to be a MultiState"):
        distribute_state(x, mesh, [Shard(0)])
    for rows, heads, words in ((1, 4, "a row or more for each of 2"), (4, 3, "as many key-value")):
        small = ms.MultiState(head.policy, batch=rows, kv_heads=heads, head_dim=8)
        with pytest.raises(ValueError, match=words):
            distribute_state(small, mesh, [Shard(0 if rows == 1 else 1)])

    gru = torch.compile(ms.min_gru, fullgraph=True, backend="aot_eager")
    leaves = [put(t, mesh, [Shard(2)]).requires_grad_() for t in (x, y)]
    h = gru(*leaves)
    same(h, ms.min_gru(x, y), [Shard(2)])
    expected = torch.autograd.grad(ms.min_gru(*leaves).sum(), leaves)
    for t, u in zip(torch.autograd.grad(h.sum(), leaves), expected, strict=True):
        assert torch.equal(t.to_local(), u.to_local())
    step = torch.compile(ms.attend_evict, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        same(step(*by_heads, mine), ms.attend_evict(*tokens, head), [Shard(1)])
        same(mine.position, head.position, [Shard(1)])
    found = step(*by_heads, shared)
    same(found, ms.attend_evict(*tokens, layer), [Shard(1)])
    same(shared.position, layer.position, [Replicate()])
    with pytest.raises(TypeError, match=r"min_gru: expected plain tensors.*to_local"):
        distributed.min_gru(in_time, in_time, group=mesh)
    with pytest.raises(TypeError, match="attend_evict: expected plain tensors"):
        distributed.attend_evict(*by_heads, mine, group=mesh)


def _masks(rank: int) -> None:
    """Layers and a block whose rows are sharded, told which steps are real and where some start."""
    mesh = init_device_mesh("cpu", (4,))
    x = torch.randn(8, 6, 3, dtype=torch.float64)
    masks = {"valid": torch.rand(8, 6) < 0.6, "resets": torch.rand(8, 6) < 0.3}
    placed = {name: put(mask, mesh, [Shard(0)]) for name, mask in masks.items()}
    layer = ms.nn.MinGRU(3, 4, 2, bidirectional=True, batch_first=True).double()
    for whole in (layer, ms.nn.MinRNNBlock(3).double()):
        sharded = distribute_module(copy.deepcopy(whole), mesh)
        expected, found = whole(x, **masks), sharded(put(x, mesh, [Shard(0)]), **placed)
        if isinstance(expected, tuple):
            expected, found = expected[0], found[0]
        torch.testing.assert_close(found.full_tensor(), expected)


def _all(rank: int, seed: int) -> None:
    for work in (_scans, _masks, _states, _models, _errors_and_compile):
        random.seed(seed)
        torch.manual_seed(seed)
        work(rank)


def test_on_four_ranks(run: Any) -> None:
    """All at once: a process takes seconds to import DTensor."""
    run(partial(_all, seed=random.randrange(2**31)))
