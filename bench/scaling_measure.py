"""What the model of bench.scaling needs from this machine, and what it has to predict.

Ranks are processes with one thread each that talk through gloo. All that is measured takes turns,
so that whatever else the machine does meets everything alike, and medians can be compared.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import msrnn_ops as ms
from bench import machine
from bench.measure import REUSE_FREED_MEMORY
from bench.scaling_model import Problem
from msrnn_ops import distributed, scan
from msrnn_ops.distributed import scan as sharded
from msrnn_ops.distributed.exchange import Exchange

RANKS = (2, 4)
PROBLEMS = (
    Problem(1, 4, 512, element=4),
    Problem(1, 1024, 512, element=4),
    Problem(1, 4096, 512, element=4),
    Problem(1, 16384, 512, element=4),
    Problem(4, 4096, 512, element=4),
    Problem(1, 4096, 2048, element=4),
)
SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)  # bytes that a rank gives to an all-gather
_GATHERS = 8  # in a row

Calls = dict[str, Callable[[], object]]


def _scans(problem: Problem, ranks: int, group: Any) -> Calls:
    """The passes over a rank's shard by themselves, and the whole op that is made of them."""
    shape = (problem.batch, problem.time // ranks, problem.channels)
    exchange = Exchange.among("min_gru", group)
    shard = sharded._Shard("min_gru", None, exchange, False, (False,), False)
    gate, candidate, grad = (torch.randn(shape) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (gate, candidate)]
    whole = partial(distributed.min_gru, group=group)

    def both(op: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*leaves), leaves, grad)

    return {
        "local forward": lambda: ms.min_gru(gate, candidate),
        "local decay": lambda: sharded._decay(shard, scan._GRU, (gate, candidate)),
        "local both": both(ms.min_gru),
        "whole forward": lambda: whole(gate, candidate),
        "whole both": both(whole),
    }


def _gather(size: int, group: Any) -> Callable[[], object]:
    exchange, mine = Exchange.among("gather", group), torch.randn(size // 4)

    def call() -> None:
        for _ in range(_GATHERS):
            exchange.gather(mine)

    return call


def _calls(ranks: int, group: Any) -> list[tuple[dict[str, Any], Calls]]:
    """What is to be timed, with what tells it apart in the results."""
    scans = [
        ({"ranks": ranks, **asdict(problem)}, _scans(problem, ranks, group)) for problem in PROBLEMS
    ]
    gathers = [({"ranks": ranks, "size": size}, {"gather": _gather(size, group)}) for size in SIZES]
    return scans + gathers


def _work(rank: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    most = max(RANKS)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=most)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    cases = [case for ranks in RANKS if rank < ranks for case in _calls(ranks, groups[ranks])]
    spans: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, what: dict[str, Any], call: Callable[[], object]) -> None:
        start = time.perf_counter()  # the same clock in all processes
        call()
        key = json.dumps({"name": name, **what})
        spans.setdefault(key, []).append((start, time.perf_counter()))

    with Progress(disable=rank > 0) as progress:
        for _ in progress.track(range(rounds), description="rounds"):
            for ranks in RANKS:
                dist.barrier()  # the other ranks wait here
                for what, calls in cases:
                    if what["ranks"] != ranks:
                        continue
                    for name, call in calls.items():
                        if name.startswith("local"):
                            dist.barrier(groups[ranks])
                            if rank == 0:
                                note(f"{name} alone", what, call)
                        dist.barrier(groups[ranks])
                        note(name, what, call)
    everybody: list[Any] = [None] * most
    dist.all_gather_object(everybody, spans)
    if rank == 0:
        rows = [_row(key, [mine[key] for mine in everybody if key in mine]) for key in spans]
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _row(key: str, everybody: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """From when the first rank begins until the last one is done."""
    row: dict[str, Any] = json.loads(key)
    turns = [
        max(end for _, end in turn) - min(start for start, _ in turn)
        for turn in zip(*everybody, strict=True)
    ]
    share = _GATHERS if row["name"] == "gather" else 1
    times = {"fastest": min(turns) / share, "median": statistics.median(turns) / share}
    return row | times


def measure(rounds: int) -> dict[str, Any]:
    os.environ.update(REUSE_FREED_MEMORY, OMP_NUM_THREADS="1")  # of the processes that start now
    torch.set_num_threads(1)
    before, begin = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (rounds, folder), max(RANKS))
        rows = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - begin),
        "rounds": rounds,
        "load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "machine": machine.machine(),
        "versions": machine.versions(),
        "rows": rows,
    }
