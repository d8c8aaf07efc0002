"""The parts ``ops``, ``triton`` and ``peers``: each op beside a copy of as many bytes, beside our
own Triton kernels, and against its peers."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cuda import peers as others
from bench.cuda.gpu import DTYPES, Call, Gpu, failed, name_of, release, worst_error
from bench.measure import Entries
from bench.peers import Function, Op, Shape
from bench.table import dimensions, say_times

SHAPES: tuple[Shape, ...] = (
    (16, 4096, 2048),  # rows and channels fill the device: a block walks T
    (1, 262144, 512),  # few channels, many steps: look-back
    (8, 4096, 256),
    (1, 65536, 16),
)
LARGE = 1 << 26  # elements: where the peers run
_PEER_SECONDS = 20.0  # compiling and first calls of one peer; then it is skipped
_BY_BOTH = ("min_gru", "min_lstm")  # Triton's kernels take seconds to compile
_SAMPLE = 16  # channels of the first row whose error is taken; rows and channels are independent
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


def _tensors(op: Op, which: str) -> int:
    """Tensors of B·T·D that a pass must move."""
    forward = 0 if which == BACKWARD else op.forward_tensors
    return forward + (0 if which == FORWARD else op.backward_tensors)


def _pass(which: str, function: Function, inputs: tuple[Tensor, ...], grad: Tensor) -> peers.Pass:
    if which == FORWARD:
        return peers.forward_pass(function, inputs)
    if which == BOTH:
        return peers.both_passes(function, inputs, grad)
    h = function(*inputs)
    return lambda: torch.autograd.grad(h, inputs, grad, retain_graph=True)


def _sample(x: Tensor) -> Tensor:
    return x.detach()[:1, :, :_SAMPLE].cpu()


class _Case:
    """An op with drawn inputs, and its float64 truth on a sample of them."""

    def __init__(self, gpu: Gpu, op: Op, shape: Shape, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.gpu, self.op, self.shape, self.dtype = gpu, op, shape, dtype
        with gpu.device:
            self.inputs = op.draw(shape, dtype)
            self.grad = torch.randn(shape).to(dtype)
        sampled = tuple(_sample(x) for x in self.inputs)
        self._h, self._grads = peers.truth(op, sampled, _sample(self.grad))

    def prepared(self, name: str, which: str) -> tuple[Call, dict[str, Any]]:
        """A competitor's pass ready to be timed; its error and its peak memory."""
        inputs = others.inputs_of(name, self.inputs)
        grad = others.layout_of(name, self.grad)
        function = others.COMPETITORS[name].make(self.op)
        call = _pass(which, function, inputs, grad)
        outputs = [_sample(others.layout_of(name, x)) for x in call()]
        truth = (self._h,) if which == FORWARD else self._grads
        tensor = math.prod(self.shape) * self.dtype.itemsize
        peak = self.gpu.peak_bytes(call) / tensor
        replay, graph = self.gpu.captured(call)
        error = worst_error(outputs, truth)
        return replay, {"error": error, "tensors": peak, "graph": graph}

    def row(
        self, which: str, names: Sequence[str], seconds: float, spent: dict[str, float]
    ) -> dict[str, Any]:
        """One pass of all competitors; `spent` counts the seconds that peers took to prepare."""
        traffic = _tensors(self.op, which) * math.prod(self.shape) * self.dtype.itemsize
        copy = self.gpu.copy(traffic)
        copy()
        calls = {"copy": self.gpu.captured(copy)[0]}
        results: dict[str, dict[str, Any]] = {}
        for name in names:
            start = time.perf_counter()
            if name not in others.own() and spent[name] > _PEER_SECONDS:
                results[name] = {"failed": "no time left"}
                continue
            try:
                calls[name], results[name] = self.prepared(name, which)
            except Exception as problem:
                results[name] = failed(name, problem)
            spent[name] += time.perf_counter() - start
        times = self.gpu.interleaved(calls, seconds)
        for name in calls.keys() & results.keys():
            results[name]["time"] = times[name]
        return {
            "op": self.op.name,
            "shape": self.shape,
            "dtype": name_of(self.dtype),
            "pass": which,
            "traffic": traffic,
            "copy": times["copy"],
            "competitors": results,
        }


def _run(
    part: str,
    gpu: Gpu,
    seconds: float,
    contestants: Callable[[Op, Shape], Sequence[str]],
    passes: Sequence[str],
    full: bool = False,
) -> Entries:
    rows: list[dict[str, Any]] = []
    spent: dict[str, float] = defaultdict(lambda: -math.inf if full else 0.0)
    for shape, name, dtype in itertools.product(SHAPES, peers.OPS, DTYPES):
        op = peers.OPS[name]
        if len(names := contestants(op, shape)) < (part != "ops") + 1:
            continue  # nobody beside us
        case = _Case(gpu, op, shape, dtype)
        for which in passes:
            rows.append(case.row(which, names, seconds, spent))
            label = f"{name} {name_of(dtype)} {dimensions(shape)} {which}"
            times = {**rows[-1]["competitors"], "copy": {"time": rows[-1]["copy"]}}
            say_times(label, times, peers.OURS)
            yield {part: rows}
            release()


def run(gpu: Gpu, seconds: float) -> Entries:
    """Ours: time, error and peak memory, beside a copy of as many bytes."""
    return _run("ops", gpu, seconds, lambda *_: [others.OURS], (FORWARD, BACKWARD, BOTH))


def run_triton(gpu: Gpu, seconds: float, full: bool) -> Entries:
    """Ours by both backends, where there are both."""

    def contestants(op: Op, _: Shape) -> list[str]:
        return others.own() if full or op.name in _BY_BOTH else []

    return _run("triton", gpu, seconds, contestants, (FORWARD, BOTH))


def run_peers(gpu: Gpu, seconds: float, full: bool) -> Entries:
    """Ours against what is installed, at large shapes."""

    def contestants(op: Op, shape: Shape) -> list[str]:
        return others.competitors(op, large=math.prod(shape) >= LARGE, full=full)

    return _run("peers", gpu, seconds, contestants, (FORWARD, BOTH), full)
