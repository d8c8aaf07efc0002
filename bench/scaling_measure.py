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


def _scans(problem: Problem, ranks: int) -> Calls:
    """The passes over a rank's shard by themselves, and the whole op that is made of them."""
    shape = (problem.batch, problem.time // ranks, problem.channels)
    shard = sharded._Shard("min_gru", None, Exchange.among("min_gru", None), False, (False,), False)
    gate, candidate, grad = (torch.randn(shape) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (gate, candidate)]

    def both(op: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*leaves), leaves, grad)

    return {
        "local forward": lambda: ms.min_gru(gate, candidate),
        "local decay": lambda: sharded._decay(shard, scan._GRU, (gate, candidate)),
        "local both": both(ms.min_gru),
        "whole forward": lambda: distributed.min_gru(gate, candidate),
        "whole both": both(distributed.min_gru),
    }


def _gather(size: int) -> Callable[[], object]:
    exchange, mine = Exchange.among("gather", None), torch.randn(size // 4)

    def call() -> None:
        for _ in range(_GATHERS):
            exchange.gather(mine)

    return call


def _work(rank: int, ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    scans = [_scans(problem, ranks) for problem in PROBLEMS]
    gathers = [_gather(size) for size in SIZES]
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def note(name: str, which: int, call: Callable[[], object], everyone: bool = True) -> None:
        dist.barrier()
        if everyone or rank == 0:
            start = time.perf_counter()  # the same clock in all processes
            call()
            spans.setdefault((name, which), []).append((start, time.perf_counter()))

    with Progress(disable=rank > 0) as progress:
        for _ in progress.track(range(rounds), description=f"{ranks} ranks"):
            for i, calls in enumerate(scans):
                for name, call in calls.items():
                    if name.startswith("local"):
                        note(f"{name} alone", i, call, everyone=False)
                    note(name, i, call)
            for i, call in enumerate(gathers):
                note("gather", i, call)
    everybody: list[Any] = [None] * ranks
    dist.all_gather_object(everybody, spans)
    if rank == 0:
        rows = [_row(ranks, name, which, everybody) for name, which in spans]
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def _row(ranks: int, name: str, which: int, everybody: list[Any]) -> dict[str, Any]:
    """From when the first rank begins until the last one is done."""
    spans = [mine[name, which] for mine in everybody if (name, which) in mine]
    turns = [
        max(end for _, end in turn) - min(start for start, _ in turn)
        for turn in zip(*spans, strict=True)
    ]
    what = {"size": SIZES[which]} if name == "gather" else asdict(PROBLEMS[which])
    share = _GATHERS if name == "gather" else 1
    times = {"fastest": min(turns) / share, "median": statistics.median(turns) / share}
    return {"name": name, "ranks": ranks, **what, **times}


def measure(rounds: int) -> dict[str, Any]:
    os.environ.update(REUSE_FREED_MEMORY, OMP_NUM_THREADS="1")  # of the processes that start now
    torch.set_num_threads(1)
    loads, rows, begin = [os.getloadavg()[0]], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            spawn(_work, (ranks, rounds, folder), ranks)
            rows += json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))
            loads.append(os.getloadavg()[0])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.monotonic() - begin,
        "rounds": rounds,
        "load": [round(load, 2) for load in loads],  # before, and after each number of ranks
        "machine": machine.machine(),
        "versions": machine.versions(),
        "rows": rows,
    }
