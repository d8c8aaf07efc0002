"""The CPU in place of a GPU, and sizes so small that each call of the benchmark is made in seconds.

``python -m bench cuda --rehearse`` and the tests use it. Nothing that it says is a speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from bench import peers as others
from bench.cuda import layers, limits, ops, peers, small, steps
from bench.cuda.gpu import Call, Gpu
from bench.measure import Timing, interleaved
from bench.step_peers import Heads

FACTS = {
    "name": "no GPU: a rehearsal on the CPU",
    "capability": "0.0",
    "multiprocessors": 0,
    "l2": 0,
    "memory": 0,
    "cuda": torch.version.cuda,
    "torch": torch.__version__,
}
DECODER = {"layers": 2, "width": 128, "inner": 16, "context": 16, "batches": (1, 2)}
_SIZES: dict[ModuleType, dict[str, Any]] = {
    limits: {"COPIES": (1 << 12,)},
    ops: {"SHAPES": ((2, 8, 4), (1, 16, 4)), "LARGE": 64},
    layers: {"SHAPES": ((2, 8, 4),)},
    small: {"SHAPES": ((1, 8, 4), (2, 4))},
    steps: {
        "SHAPES": ((1, 8), (2, 8), (1, 16), (2, 16)),
        "OTHERS": ((Heads(4, 2, 16), (2, 8)),),
        "COMPILED": (),
    },
}


class StandIn(Gpu):
    """Makes every call where a GPU would capture it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def captured(self, call: Call, count: int = 1) -> tuple[Call, bool]:
        return lambda: [call() for _ in range(count)], True

    def interleaved(
        self, calls: Mapping[str, Call], seconds: float, *, cold: bool = True
    ) -> dict[str, Timing]:
        return interleaved(calls, seconds)

    def peak_bytes(self, call: Call) -> int:
        call()
        return 1

    def empty_kernel(self) -> None:
        pass

    def warm_up(self) -> None:
        pass


def shrink(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Tiny sizes, nothing that compiles or waits for a GPU, and Triton's place taken by ours."""
    for module, sizes in _SIZES.items():
        for name, value in sizes.items():
            put(module, name, value)
    for module in (layers, limits, ops, small, steps):
        put(module, "release", lambda: None)
    eager = peers.COMPETITORS | {
        others.HEINSEN_COMPILED: peers.Competitor(others.heinsen, ("min_gru",)),
        others.ASSOCIATIVE_COMPILED: peers.Competitor(others.reference, ("min_gru",)),
        peers.TRITON: peers.Competitor(others.ours, tuple(others.OPS)),
    }
    put(peers, "COMPETITORS", eager)
    put(peers, "own", lambda: [peers.OURS, peers.TRITON])
