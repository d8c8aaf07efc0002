"""The part ``ops``: each op beside a streaming copy of as many bytes, and against its peers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cpu.limits import copier
from bench.measure import Entries, interleaved, largest_error
from bench.peers import Shape
from bench.table import dimensions, op_label, running, say_times

SHAPES: tuple[Shape, ...] = (
    (8, 512, 256),
    (8, 512, 1024),
    (1, 65536, 16),
    (8, 4096, 256),
    (1, 65536, 256),
)
_QUICK_OPS, _QUICK_SHAPES = ("min_gru", "min_lstm"), 3
_SLOW_PEERS = 1 << 22  # elements that every op is compared at unless all are asked for
_SAMPLE = 16  # channels of the first row whose error is taken; rows and channels are independent


@dataclass(frozen=True)
class Case:
    op: peers.Op
    shape: Shape
    dtype: torch.dtype
    backward: bool
    full: bool

    def competitors(self) -> list[str]:
        names, wide = [peers.OURS], self.dtype == torch.float32
        small = math.prod(self.shape) <= _SLOW_PEERS
        headline = self.op.name == "min_gru" and wide
        if self.op.logarithms is not None and (self.full or small or headline):
            names.append(peers.HEINSEN)
        if self.shape == SHAPES[0] and (headline or (self.full and wide)):
            names.append(peers.REFERENCE)  # a Python loop: few steps
        if wide and (self.full or self.compiles()):
            names += [peers.HEINSEN_COMPILED] if self.op.logarithms is not None else []
            names.append(peers.ASSOCIATIVE_COMPILED)
        return names

    def compiles(self) -> bool:
        """The one case in which compiled peers always run, for compiling takes long."""
        headline = self.op.name == "min_gru" and self.dtype == torch.float32
        return headline and self.backward and self.shape == SHAPES[0]


def _cases(full: bool) -> list[Case]:
    names = tuple(peers.OPS) if full else _QUICK_OPS
    shapes = SHAPES if full else SHAPES[:_QUICK_SHAPES]
    passes, dtypes = (False, True) if full else (True,), (torch.float32, torch.bfloat16)
    return [
        Case(peers.OPS[name], shape, dtype, backward, full)
        for name, shape, backward in itertools.product(names, shapes, passes)
        for dtype in dtypes[: 2 if name == "min_gru" else 1]
    ]


def sample(x: Tensor) -> Tensor:
    return x[:1, :, :_SAMPLE]


def sampled_truth(
    op: peers.Op, inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return peers.truth(op, tuple(map(sample, inputs)), sample(grad))


def _run_case(case: Case, seconds: float) -> dict[str, Any]:
    op = case.op
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = op.draw(case.shape, case.dtype)
    grad = torch.randn(case.shape).to(case.dtype)
    h, grads = sampled_truth(op, inputs, grad)
    traffic = op.traffic(case.shape, case.dtype, case.backward)
    copy = copier(traffic)  # first, lest it takes the blocks that the warmed-up calls reuse
    copy()
    calls: dict[str, peers.Pass] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in case.competitors():
        function = peers.COMPETITORS[name](op)
        if case.backward:
            call = peers.both_passes(function, inputs, grad)
        else:
            call = peers.forward_pass(function, inputs)
        try:
            outputs = [sample(x).clone() for x in call()]  # a view would keep all of x
        except Exception as problem:  # a peer that this machine cannot compile or hold
            results[name] = {"failed": type(problem).__name__}
            continue
        results[name] = {"error": largest_error(outputs, grads if case.backward else (h,))}
        calls[name] = call
    timings = interleaved({**calls, "copy": copy}, seconds)
    for name in calls:
        results[name]["time"] = timings[name]
    return {
        "op": op.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backward": case.backward,
        "traffic": traffic,
        "copy": timings["copy"],
        "competitors": results,
    }


def run(seconds: float, full: bool) -> Entries:
    """What compiles comes last, so that the first ratios are there soon."""
    cases, rows = _cases(full), dict[int, dict[str, Any]]()
    for i in sorted(range(len(cases)), key=lambda i: cases[i].compiles()):
        case = cases[i]
        which = "forward and backward" if case.backward else "forward"
        names = {"op": case.op.name, "dtype": str(case.dtype).removeprefix("torch.")}
        label = f"{op_label(names)} {dimensions(case.shape)} {which}"
        with running(label):
            rows[i] = _run_case(case, seconds)
        say_times(label, rows[i]["competitors"], peers.OURS)
        yield {"ops": [rows[i] for i in sorted(rows)]}
