"""Layers whose time is sharded over ranks: real processes, gloo, against one process."""

from __future__ import annotations

import copy
import doctest
import itertools
import json
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scans import norm_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils.rnn import pack_sequence

from msrnn_ops.distributed import shard_time
from msrnn_ops.nn import BlockState, MinGRU, MinLSTM, MinRNNBlock

pytest.importorskip("click")  # for bench
pytest.importorskip("rich")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
BATCH, WIDTH, STATES = 2, 4, 3  # STATES: of packed sequences
SHARES = ([5, 1, 0, 7], [0, 2, 1, 0], [0, 0, 0, 0], [3, 9])  # steps of each rank
MODULES: dict[str, Callable[[], Any]] = {
    "gru": lambda: MinGRU(WIDTH, 6, 2, bidirectional=True, batch_first=True),
    "lstm, time major": lambda: MinLSTM(WIDTH, 5, 2, bidirectional=True, activation="identity"),
    "dropout of all": lambda: MinGRU(WIDTH, 6, 2, bias=False, batch_first=True, dropout=1.0),
    "learnable states": lambda: MinGRU(WIDTH, 6, batch_first=True, learnable_h0=True),
    "block": lambda: MinRNNBlock(WIDTH, expansion=1.5),
    "block, long convolution": lambda: MinRNNBlock(WIDTH, cell="lstm", conv=9, mlp=0),
    "block, pointwise convolution": lambda: MinRNNBlock(WIDTH, conv=1),
    "block, no convolution": lambda: MinRNNBlock(WIDTH, conv=0),
}


def seeded(*key: object) -> None:
    """The same numbers on every rank."""
    random.seed(repr(key))
    torch.manual_seed(random.randrange(2**31))


def draw_steps(kind: str, time: int) -> dict[str, Tensor]:
    """What a layer is told of its steps: nothing, resets, valid, both, or borders."""
    if kind == "cu_seqlens":
        outside = random.choice([0, time // 5])
        inner = sorted(random.randint(outside, time - outside) for _ in range(STATES - 1))
        return {"cu_seqlens": torch.tensor([outside, *inner, time - outside])}
    masks = {"resets": torch.rand(BATCH, time) < 0.25, "valid": torch.rand(BATCH, time) < 0.6}
    return {name: mask for name, mask in masks.items() if name in kind}


def states(module: Any, batch: int = BATCH) -> list[Tensor]:
    """Random ones, to begin with."""
    if isinstance(module, MinRNNBlock):
        steps = 0 if module.conv is None else module.conv.kernel_size[0] - 1
        shapes = [(batch, module.rnn.hidden_size), (batch, steps, WIDTH)]
    else:
        count = module.num_layers * (1 + module.bidirectional)
        shapes = [(count, batch, module.hidden_size)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def call(
    module: Any, x: Tensor, state: list[Tensor] | None, **steps: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (B, T, ...) and the last states."""
    if isinstance(module, MinRNNBlock):
        before = None if state is None else BlockState(*state)
        y, last = module(x, before, return_state=True, **steps)
        return y, list(last)
    hx = None if state is None else state[0]
    if module.batch_first:
        y, last = module(x, hx, **steps)
    else:
        steps = {name: mask if mask.dim() == 1 else mask.t() for name, mask in steps.items()}
        y, last = module(x.transpose(0, 1), hx, **steps)
        y = y.transpose(0, 1)
    return y, [last[0] if isinstance(last, tuple) else last]


def compare(module: Any, shares: list[int], group: Any, with_state: bool, kind: str = "") -> None:
    """Outputs, last states and gradients of every rank's share."""
    rank, ranks = dist.get_rank(group), len(shares)
    ends = torch.tensor(shares).cumsum(0).tolist()
    here = slice(ends[rank] - shares[rank], ends[rank])
    steps, packed = draw_steps(kind, ends[-1]), kind == "cu_seqlens"
    x = torch.randn(1 if packed else BATCH, ends[-1], WIDTH, dtype=torch.float64)
    state = states(module, STATES if packed else BATCH)
    of_y: Tensor | None = None
    of_last = [torch.randn(ranks, *part.shape, dtype=torch.float64) for part in state]

    def run(module: Any, x: Tensor, here: slice, ranks: slice) -> tuple[list[Tensor], list[Tensor]]:
        nonlocal of_y
        leaves = [part.clone().requires_grad_() for part in (x, *state)]
        told = {name: x if name == "cu_seqlens" else x[:, here] for name, x in steps.items()}
        y, last = call(module, leaves[0], leaves[1:] if with_state else None, **told)
        if of_y is None:
            of_y = torch.randn_like(y)
        total = (y * of_y[:, here]).sum()
        for part, weight in zip(last, of_last, strict=True):
            total = total + (part * weight[ranks].sum(0)).sum()
        leaves += list(module.parameters())
        total = total + sum(0 * part.sum() for part in leaves)  # which may not be used
        grads = torch.autograd.grad(total, leaves)
        return [y.detach(), *(part.detach() for part in last)], list(grads)

    (exact_y, *exact_last), (exact_x, *exact) = run(module, x, slice(None), slice(None))
    sharded = shard_time(copy.deepcopy(module), group)
    (y, *last), (of_x, *found) = run(sharded, x[:, here], here, slice(rank, rank + 1))
    found = [grad.contiguous() for grad in found]  # as all_reduce needs it
    for grad in found:
        dist.all_reduce(grad, group=group)
    pairs = [(y, exact_y[:, here]), (of_x, exact_x[:, here])]
    pairs += [*zip(last, exact_last, strict=True), *zip(found, exact, strict=True)]
    assert all(norm_error(mine, truth) < 1e-12 for mine, truth in pairs)
    for part in last:
        everywhere = [torch.empty_like(part) for _ in range(ranks)]
        dist.all_gather(everywhere, part.contiguous(), group=group)
        assert all(torch.equal(part, other) for other in everywhere)


def _layers(rank: int, seed: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for name, shares in itertools.product(MODULES, SHARES):
        seeded(seed, name, shares)
        group = pairs[rank // 2] if len(shares) == 2 else dist.group.WORLD
        kind = random.choice(["", "resets", "valid", "resets and valid", "cu_seqlens"])
        compare(MODULES[name]().double(), shares, group, random.random() < 0.7, kind)


def _batched_gradients(rank: int) -> None:
    """Collectives would send the batch as one gradient."""
    for module in (MinGRU(WIDTH, 3, batch_first=True), MinRNNBlock(WIDTH)):
        x = torch.randn(BATCH, 4, WIDTH, requires_grad=True)
        y = shard_time(module, dist.group.WORLD)(x)
        y = y[0] if isinstance(y, tuple) else y
        with pytest.raises(NotImplementedError, match="no batched gradients"):
            torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)
        with pytest.raises(NotImplementedError, match="no forward mode and no torch"):
            torch.func.jvp(module, (x.detach(),), (x.detach(),))


def _compiled(rank: int) -> None:
    """Where no rank needs the last states, and the last one no gradients from later ones."""
    block = shard_time(MinRNNBlock(WIDTH), init_device_mesh("cpu", (2,)))
    state = BlockState(*(part.float() for part in states(block)))

    def loss(x: Tensor) -> Tensor:
        return block(x, state).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 3 - 2 * rank, WIDTH, requires_grad=True)
    wanted = (x, *block.parameters())
    expected = torch.autograd.grad(loss(x), wanted)
    for mine, truth in zip(torch.autograd.grad(compiled(x), wanted), expected, strict=True):
        torch.testing.assert_close(mine, truth)


def _copies_and_errors(rank: int) -> None:
    model = nn.Sequential(MinRNNBlock(WIDTH), MinRNNBlock(WIDTH, cell="lstm"))
    x = torch.randn(BATCH, 3, WIDTH)
    alone = model(x)
    weights = copy.deepcopy(model.state_dict())
    assert shard_time(model, dist.group.WORLD) is model
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert list(model.state_dict()) == list(weights)
    if rank:
        assert not torch.allclose(model(x), alone)
    else:
        model(x)
    with pytest.raises(TypeError, match="time is sharded cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match="MinRNNBlock: expected time not to be sharded for step"):
        model[0].step(x[:, 0])
    with pytest.raises(ValueError, match="MinLSTM: expected time not to be sharded for step"):
        model[1].rnn.step(x[:, 0])
    with pytest.raises(TypeError, match=r"MinGRU: expected a tensor, as .* got a PackedSequence"):
        model[0].rnn(pack_sequence([x[0], x[1]]))
    with pytest.raises(ValueError, match=r"layers of msrnn_ops\.nn, got Linear"):
        shard_time(nn.Linear(2, 2), dist.group.WORLD)
    with pytest.raises(ValueError, match="mesh of one dimension, got 2"):
        shard_time(model, init_device_mesh("cpu", (2, 1)))
    with pytest.raises(TypeError, match="a process group, a mesh or None, got int"):
        shard_time(model, 0)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "context"))
    shard_time(model, mesh["context"])
    assert torch.equal(model(x), alone)
    model[0].step(x[:, 0])
    shard_time(shard_time(model, dist.group.WORLD), None)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), alone)


TOKENS = torch.arange(500) ** 2 % 7  # of seven characters
STEPS = 3


def training(mesh: Any = None, fsdp: bool = False) -> Any:
    from bench.papers.distributed import Setting, Training

    setting = Setting(width=8, batch=3, time=21)
    return Training(setting, 7, torch.device("cpu"), mesh, fsdp=fsdp, dtype=torch.float64)


def _training(rank: int, folder: Path, load: bool) -> None:
    """With DDP and with FSDP, from the start or from what the other one saved."""
    shape = dist.get_world_size() // 2, 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "context"))
    expected = training().train(TOKENS, 2 * STEPS)[0]
    for fsdp in (False, True):
        model = training(mesh, fsdp)
        if load:
            model.load(folder / str(not fsdp))
        assert model.step == STEPS * load
        losses, _ = model.train(TOKENS, STEPS)
        exact = expected[STEPS:] if load else expected[:STEPS]
        torch.testing.assert_close(losses, exact, atol=0, rtol=1e-9)
        if not load:
            model.save(folder / str(fsdp))


def _four_ranks(rank: int, seed: int, folder: Path) -> None:
    _layers(rank, seed)
    _training(rank, folder, load=False)


def _two_ranks(rank: int, seed: int, folder: Path) -> None:
    _batched_gradients(rank)
    _training(rank, folder, load=True)
    seeded(seed)
    _compiled(rank)
    _copies_and_errors(rank)


def test_documentation_example() -> None:
    from msrnn_ops.distributed import nn

    result = doctest.testmod(nn)
    assert result.attempted > 0 and result.failed == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from bench.__main__ import command
    from bench.papers import distributed

    file = tmp_path / "results.json"
    words = ["distributed", "--steps", "2", "--check", "--json", str(file)]
    command.main(words, standalone_mode=False)
    (name, run), *more = json.loads(file.read_text("utf-8"))["runs"].items()
    assert name == "python -m bench distributed --steps 2 --check --json results.json"
    assert not more and len(run["losses"]) == 2 and run["difference"] <= run["tolerance"]
    monkeypatch.setattr(distributed, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match=r"expected losses within -1\.0"):
        command.main(words, standalone_mode=False)
    result = CliRunner().invoke(command, ["distributed", "--context", "2"])
    assert result.exit_code == 1 and "a divisor of 1 ranks" in result.output


@pytest.mark.slow
def test_four_ranks_and_two_that_go_on(run: Any, tmp_path: Path) -> None:
    """Values, gradients, training; compile, copies, errors. In few processes: torch takes long to
    start."""
    seed = random.randrange(2**31)
    run(partial(_four_ranks, seed=seed, folder=tmp_path))
    run(partial(_two_ranks, seed=seed, folder=tmp_path), ranks=2)
