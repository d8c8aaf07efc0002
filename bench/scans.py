"""The parts ``ops`` (each op against its peers) and ``accuracy`` (time and error against T)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from bench import peers
from bench.limits import copier
from bench.measure import interleaved, largest_error, norm_error, peak_tensors
from bench.peers import Shape

SHAPES: tuple[Shape, ...] = (
    (8, 512, 256),
    (8, 512, 1024),
    (8, 4096, 256),
    (1, 65536, 256),
    (1, 65536, 16),
)
_MEMORY_SHAPE = (4, 4096, 1024)
_LENGTHS = (1024, 4096, 16384, 65536)
_WIDTH = 256  # of the sweep over lengths
_LONGEST_REFERENCE = 8192  # steps, batch times time: it is a Python loop
_SLOW_PEERS = 1 << 22  # elements that every op is compared at in the default run
_SAMPLE = 16  # channels of the first row whose error is taken; rows and channels are independent


@dataclass(frozen=True)
class Case:
    op: peers.Op
    shape: Shape
    dtype: torch.dtype
    backward: bool
    competitors: tuple[str, ...]


def _competitors(
    op: peers.Op, shape: Shape, dtype: torch.dtype, *, smallest: bool, backward: bool, full: bool
) -> tuple[str, ...]:
    names = [peers.OURS]
    small = math.prod(shape) <= _SLOW_PEERS  # beyond it only the headline: min_gru in float32
    headline = op.name == "min_gru" and dtype == torch.float32
    if op.logarithms is not None and (full or small or headline):
        names.append(peers.HEINSEN)
    if dtype != torch.float32:
        return tuple(names)
    if smallest and shape[0] * shape[1] <= _LONGEST_REFERENCE:
        names.append(peers.REFERENCE)
    if full or (smallest and backward and op.name == "min_gru"):  # compiling takes long
        names += [peers.HEINSEN_COMPILED] if op.logarithms is not None else []
        names.append(peers.ASSOCIATIVE_COMPILED)
    return tuple(names)


def _cases(names: Sequence[str], shapes: Sequence[Shape], full: bool) -> list[Case]:
    cases = []
    smallest = min(shapes, key=math.prod)
    for name, shape, backward in itertools.product(names, shapes, (False, True)):
        op = peers.OPS[name]
        for dtype in (torch.float32, torch.bfloat16)[: 2 if name == "min_gru" else 1]:
            competitors = _competitors(
                op, shape, dtype, smallest=shape == smallest, backward=backward, full=full
            )
            cases.append(Case(op, shape, dtype, backward, competitors))
    return cases


def _sample(x: Tensor) -> Tensor:
    return x[:1, :, :_SAMPLE]


def _sampled_truth(
    op: peers.Op, inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return peers.truth(op, tuple(map(_sample, inputs)), _sample(grad))


def _run_case(case: Case, seconds: float) -> dict[str, Any]:
    op = case.op
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = op.draw(case.shape, case.dtype)
    grad = torch.randn(case.shape).to(case.dtype)
    h, grads = _sampled_truth(op, inputs, grad)
    traffic = op.traffic(case.shape, case.dtype, case.backward)
    copy = copier(traffic)  # first, lest it takes the blocks that the warmed-up calls reuse
    copy()
    calls: dict[str, peers.Pass] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in case.competitors:
        function = peers.COMPETITORS[name](op)
        if case.backward:
            call = peers.both_passes(function, inputs, grad)
        else:
            call = peers.forward_pass(function, inputs)
        try:
            outputs = [_sample(x).clone() for x in call()]  # a view would keep all of x
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


def run_ops(
    names: Sequence[str], shapes: Sequence[Shape], seconds: float, full: bool
) -> list[dict[str, Any]]:
    """The part ``ops``."""
    cases = _cases(names, shapes, full)
    return [_run_case(case, seconds) for case in track(cases, "ops     ")]


def run_memory(names: Sequence[str]) -> list[dict[str, Any]]:
    """Peak memory, measured in processes of their own."""
    chosen = [name for name in ("min_gru", "min_lstm") if name in names]
    cases = list(itertools.product(chosen, (peers.OURS, peers.HEINSEN)))
    return [
        {
            "op": op,
            "competitor": competitor,
            "shape": _MEMORY_SHAPE,
            "tensors": peak_tensors(op, competitor, _MEMORY_SHAPE),
        }
        for op, competitor in track(cases, "memory  ")
    ]


def _errors(
    function: peers.Function, inputs: tuple[Tensor, ...], grad: Tensor, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    h = function(*inputs)
    (gate_grad,) = torch.autograd.grad(h, inputs[:1], grad)
    return {
        "error_h": norm_error(_sample(h.detach()), truth[0]),
        "error_gate": norm_error(_sample(gate_grad), truth[1]),
    }


def _run_length(time: int, gate_mean: int, names: Sequence[str], seconds: float) -> dict[str, Any]:
    op = peers.OPS["min_gru"]
    torch._dynamo.reset()
    torch.manual_seed(0)
    gate, candidate = op.draw((1, time, _WIDTH), torch.float32)
    inputs = ((gate.detach() + gate_mean).requires_grad_(), candidate)
    grad = torch.randn(1, time, _WIDTH)
    h, grads = _sampled_truth(op, inputs, grad)
    functions = {name: peers.COMPETITORS[name](op) for name in names}
    results = {
        name: _errors(function, inputs, grad, (h, grads[0])) for name, function in functions.items()
    }
    calls = {
        name: peers.both_passes(function, inputs, grad) for name, function in functions.items()
    }
    timings = interleaved(calls, seconds)
    return {
        "op": op.name,
        "shape": (1, time, _WIDTH),
        "gate_mean": gate_mean,
        "competitors": {name: {"time": timings[name], **results[name]} for name in names},
    }


def run_accuracy(seconds: float, full: bool) -> list[dict[str, Any]]:
    """The part ``accuracy``: time and norm-relative error of min_gru against T.

    Gates around 0 remember a few steps, gates around -8 some thousands.
    """
    rows = []
    for mean, time in track(list(itertools.product((0, -8), _LENGTHS)), "accuracy"):
        names = [peers.OURS, peers.HEINSEN]
        if mean == 0:
            names += [peers.REFERENCE] if time <= _LONGEST_REFERENCE else []
            if full or time in (_LENGTHS[0], _LENGTHS[-1]):
                names.append(peers.ASSOCIATIVE_COMPILED)
        elif not full:
            names.remove(peers.HEINSEN)
        rows.append(_run_length(time, mean, names, seconds))
    return rows
