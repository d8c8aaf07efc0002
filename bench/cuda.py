"""``python -m bench --device cuda``: limits of the device, the ops, layers and small calls.

Every part is a generator: it yields its entries of the results whenever they have grown, so that
a run that is cut short leaves what it has measured.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import msrnn_ops as ms
from bench import cuda_peers, cuda_steps, peers
from bench.cuda_measure import Call, Gpu, failed, release, say, worst_error
from bench.measure import Timing
from bench.peers import Function, Op, Shape
from bench.table import dimensions, duration

Entries = Iterator[dict[str, Any]]

SHAPES: tuple[Shape, ...] = (
    (16, 4096, 2048),  # rows and channels fill the device: a block walks T
    (1, 262144, 512),  # few channels, many steps: look-back
    (8, 4096, 256),
    (1, 65536, 16),
)
_COPIES = tuple(megabytes << 20 for megabytes in (6, 24, 96, 256, 1024))
_LAYERS: tuple[Shape, ...] = ((8, 512, 256), (8, 4096, 1024), (1, 4096, 1024))
_SMALL: tuple[Shape, ...] = ((1, 512, 256), (8, 512, 256), (1, 1, 1024), (64, 1, 1024))
_STEPS: tuple[Shape, ...] = ((1, 1024), (64, 1024))
_DTYPES = (torch.bfloat16, torch.float32)
_LARGE = 1 << 26  # elements: where the peers run
_PEER_SECONDS = 20.0  # compiling and first calls of one peer; then it is skipped
_SAMPLE = 16  # channels of the first row whose error is taken; rows and channels are independent
_CALLS = 64  # of a small op in one graph
_EMPTY = "empty kernel"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say_times(label: str, results: dict[str, dict[str, Any]]) -> None:
    times = {k: duration(v["time"]) if "time" in v else v["failed"] for k, v in results.items()}
    say(f"{label}:", ", ".join(f"{name} {time}" for name, time in times.items()))


def _divided(taken: Timing, by: int) -> Timing:
    return {k: v if k == "count" else v / by for k, v in taken.items()}


# Limits.


def _add(gpu: Gpu, traffic: int) -> Call:
    """Two reads for each write, as in the forward pass of most ops."""
    a, b, c = (gpu.randn(max(traffic // 12, 1)) for _ in range(3))
    return lambda: torch.add(a, b, out=c)


def empty_launch(gpu: Gpu, seconds: float) -> Timing:
    gpu.empty_kernel()
    replay, _ = gpu.captured(gpu.empty_kernel, _CALLS)
    taken = gpu.interleaved({_EMPTY: replay}, seconds, cold=False)[_EMPTY]
    return _divided(taken, _CALLS)


def run_limits(gpu: Gpu, seconds: float) -> Entries:
    """How fast memory can be copied, cold; how long a launch takes at least."""
    rows: list[dict[str, Any]] = []
    limits = {"empty_kernel": empty_launch(gpu, seconds), "copies": rows}
    for size in _COPIES:
        calls = {"copy": gpu.copy(size), "add": _add(gpu, size)}
        for call in calls.values():
            call()
        replays = {name: gpu.captured(call)[0] for name, call in calls.items()}
        times = gpu.interleaved(replays, seconds)
        rates = {name: size / taken["median"] for name, taken in times.items()}
        rows.append({"traffic": size, "bytes_per_second": rates, "times": times})
        say(f"limits {size >> 20} MiB:", *(f"{k} {v / 1e9:.0f} GB/s" for k, v in rates.items()))
        yield {"limits": limits}
        del calls, replays
        release()


# Ops.


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
        inputs = cuda_peers.inputs_of(name, self.inputs)
        grad = cuda_peers.layout_of(name, self.grad)
        function = cuda_peers.COMPETITORS[name].make(self.op)
        call = _pass(which, function, inputs, grad)
        outputs = [_sample(cuda_peers.layout_of(name, x)) for x in call()]
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
            if name not in cuda_peers.own() and spent[name] > _PEER_SECONDS:
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
            "dtype": _name(self.dtype),
            "pass": which,
            "traffic": traffic,
            "copy": times["copy"],
            "competitors": results,
        }


def run_ops(
    gpu: Gpu, names: Sequence[str], shapes: Sequence[Shape], seconds: float, full: bool
) -> Entries:
    """Each op: time, error and peak memory, beside a copy of as many bytes and its peers."""
    rows: list[dict[str, Any]] = []
    spent: dict[str, float] = defaultdict(lambda: -math.inf if full else 0.0)
    for shape, name, dtype in itertools.product(shapes, names, _DTYPES):
        op = peers.OPS[name]
        case = _Case(gpu, op, shape, dtype)
        contestants = cuda_peers.competitors(op, large=math.prod(shape) >= _LARGE, full=full)
        for which in (FORWARD, BACKWARD, BOTH):
            chosen = cuda_peers.own() if which == BACKWARD else contestants
            rows.append(case.row(which, chosen, seconds, spent))
            label = f"{name} {_name(dtype)} {dimensions(shape)} {which}"
            _say_times(label, {**rows[-1]["competitors"], "copy": {"time": rows[-1]["copy"]}})
            yield {"ops": rows}
            release()


# Layers.


def _layers(width: int) -> dict[str, tuple[nn.Module, Function]]:
    """Modules and what is done to their output, by name."""

    def same(x: Tensor) -> Tensor:
        return x

    def first(output: tuple[Tensor, object]) -> Tensor:
        return output[0]

    two, three = nn.Linear(width, 2 * width), nn.Linear(width, 3 * width)
    return {
        "projection to 2 D": (two, same),
        "minGRU": (two, ms.min_gru_joint),
        "nn.GRU": (nn.GRU(width, width, batch_first=True), first),
        "projection to 3 D": (three, same),
        "minLSTM": (three, ms.min_lstm_joint),
        "nn.LSTM": (nn.LSTM(width, width, batch_first=True), first),
    }


def _layer_call(which: str, module: nn.Module, after: Function, x: Tensor) -> Call:
    wanted = (x, *module.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return after(module(x))

    if which == FORWARD:
        return forward
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(after(module(x)), wanted, grad)


def _layer_row(
    gpu: Gpu, shape: Shape, dtype: torch.dtype, which: str, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = gpu.randn(*shape).to(dtype).requires_grad_()
    with gpu.device:
        layers = _layers(shape[-1])
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, (module, after) in layers.items():
        try:
            call = _layer_call(which, module.to(dtype), after, x)
            call()
            calls[name], graph = gpu.captured(call)
        except Exception as problem:
            results[name] = failed(name, problem)
        else:
            results[name] = {"graph": graph}
    for name, taken in gpu.interleaved(calls, seconds).items():
        results[name]["time"] = taken
    return {"shape": shape, "dtype": _name(dtype), "pass": which, "layers": results}


def run_layers(gpu: Gpu, shapes: Sequence[Shape], seconds: float) -> Entries:
    """A projection and its scan, against cuDNN's recurrent layers.

    Products in float32 may use TF32: cuDNN's own default, here of every layer alike.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []
    for shape, dtype, which in itertools.product(shapes, _DTYPES, (FORWARD, BOTH)):
        rows.append(_layer_row(gpu, shape, dtype, which, seconds))
        _say_times(f"layers {dimensions(shape)} {_name(dtype)} {which}", rows[-1]["layers"])
        yield {"layers": rows}
        release()
    torch.set_float32_matmul_precision(before)


# Small calls.


def _small_calls(gpu: Gpu, shape: Shape, dtype: torch.dtype) -> dict[str, Call]:
    """The scans at (B, T, D), the step forms at (B, D)."""
    x, y, z = (gpu.randn(*shape).to(dtype) for _ in range(3))
    h = torch.zeros_like(x)
    if len(shape) == 2:
        return {
            "min_gru_step": lambda: ms.min_gru_step(x, y, h),
            "min_lstm_step": lambda: ms.min_lstm_step(x, y, z, h),
        }
    decay = x.sigmoid()
    return {
        "min_gru": lambda: ms.min_gru(x, y),
        "min_lstm": lambda: ms.min_lstm(x, y, z),
        "linear_scan": lambda: ms.linear_scan(decay, y),
    }


@torch.no_grad()
def _small_row(gpu: Gpu, shape: Shape, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    calls: dict[str, Call] = {_EMPTY: gpu.empty_kernel, **_small_calls(gpu, shape, dtype)}
    replays: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            call()
            replays[name], graph = gpu.captured(call, _CALLS)
        except Exception as problem:
            results[name] = failed(name, problem)
        else:
            results[name] = {"graph": graph}
    for name, taken in gpu.interleaved(replays, seconds, cold=False).items():
        results[name]["time"] = _divided(taken, _CALLS)
    return {"shape": shape, "dtype": _name(dtype), "calls": results}


def run_small(gpu: Gpu, seconds: float) -> Entries:
    """Time per call of small forward passes, one after the other in a graph, the L2 warm."""
    rows: list[dict[str, Any]] = []
    for shape, dtype in itertools.product((*_SMALL, *_STEPS), _DTYPES):
        rows.append(_small_row(gpu, shape, dtype, seconds))
        _say_times(f"small {dimensions(shape)} {_name(dtype)}", rows[-1]["calls"])
        yield {"small": rows}
        release()


def measures(
    device: torch.device,
    names: Sequence[str],
    shapes: Sequence[Shape] | None,
    seconds: float,
    full: bool,
) -> dict[str, Callable[[], Iterable[dict[str, Any]]]]:
    """Each part as a call that yields its entries of the results."""
    gpu = Gpu(device)
    gpu.warm_up()
    return {
        "limits": lambda: run_limits(gpu, seconds),
        "steps": lambda: cuda_steps.run_steps(gpu, seconds, full),
        "ops": lambda: run_ops(gpu, names, shapes or SHAPES, seconds, full),
        "decoding": lambda: cuda_steps.run_decoding(gpu, seconds),
        "layers": lambda: run_layers(gpu, _LAYERS, seconds),
        "small": lambda: run_small(gpu, seconds),
    }
