"""The part ``accuracy``: time and error of min_gru against sequence length, and a picture of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.cpu.ops import sample, sampled_truth
from bench.measure import Entries, interleaved, norm_error
from bench.table import running, say_times

_LENGTHS = (1024, 4096, 16384, 65536)
_LONGEST_REFERENCE = 8192  # steps: it is a Python loop
_WIDTH = 256


def _errors(
    function: peers.Function, inputs: tuple[Tensor, ...], grad: Tensor, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    h = function(*inputs)
    (gate_grad,) = torch.autograd.grad(h, inputs[:1], grad)
    return {
        "error_h": norm_error(sample(h.detach()), truth[0]),
        "error_gate": norm_error(sample(gate_grad), truth[1]),
    }


def _run_length(time: int, gate_mean: int, names: Sequence[str], seconds: float) -> dict[str, Any]:
    op = peers.OPS["min_gru"]
    torch._dynamo.reset()
    torch.manual_seed(0)
    gate, candidate = op.draw((1, time, _WIDTH), torch.float32)
    inputs = ((gate.detach() + gate_mean).requires_grad_(), candidate)
    grad = torch.randn(1, time, _WIDTH)
    h, grads = sampled_truth(op, inputs, grad)
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


def run(seconds: float, full: bool) -> Entries:
    """Gates around 0 remember a few steps, gates around -8 some thousands."""
    rows: list[dict[str, Any]] = []
    for mean, time in itertools.product((0, -8), _LENGTHS):
        names = [peers.OURS, peers.HEINSEN]
        if mean == 0:
            names += [peers.REFERENCE] if time <= _LONGEST_REFERENCE else []
            if full or time in (_LENGTHS[0], _LENGTHS[-1]):
                names.append(peers.ASSOCIATIVE_COMPILED)
        elif not full:
            names.remove(peers.HEINSEN)
        label = f"min_gru, {time:,} steps, gates around {mean}"
        with running(label):
            rows.append(_run_length(time, mean, names, seconds))
        say_times(label, rows[-1]["competitors"], peers.OURS)
        yield {"accuracy": rows}


_COLOURS = {
    peers.OURS: "#0b6e4f",
    peers.HEINSEN: "#c1440e",
    peers.ASSOCIATIVE_COMPILED: "#3d5a98",
    peers.REFERENCE: "#7a7a7a",
}
_ERRORS = (  # competitor, mean of the gates, what is off, line, label
    (peers.OURS, 0, "error_h", "-", "msrnn_ops, h"),
    (peers.OURS, 0, "error_gate", "--", "msrnn_ops, gate gradient"),
    (peers.OURS, -8, "error_gate", ":", "msrnn_ops, gate gradient, slow gates"),
    (peers.HEINSEN, 0, "error_h", "-", "Heinsen, h"),
    (peers.HEINSEN, 0, "error_gate", "--", "Heinsen, gate gradient"),
)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["accuracy"]

    def plot(axes: Any, name: str, mean: int, value: Any, line: str, label: str) -> None:
        found = [
            (row["shape"][1], value(row["competitors"][name]))
            for row in rows
            if name in row["competitors"] and row["gate_mean"] == mean
        ]
        if found:
            colour = _COLOURS[name]
            axes.plot(
                *zip(*sorted(found), strict=True), line, marker="o", color=colour, label=label
            )

    pyplot.rcParams.update({"font.size": 10, "lines.linewidth": 1.8, "lines.markersize": 4})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name in _COLOURS:
        plot(left, name, 0, lambda result: result["time"]["median"] * 1e3, "-", name)
    for name, mean, key, line, label in _ERRORS:
        plot(right, name, mean, lambda result, key=key: result[key], line, label)
    left.set(title="Time", ylabel="time of forward and backward (ms)")
    right.set(title="Error", ylabel="relative error against float64")
    lengths = sorted({row["shape"][1] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("sequence length T (steps)")
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        axes.legend(frameon=False, fontsize=9, ncols=2, handlelength=3.5, **below)
    machine = results["machine"]
    figure.suptitle(
        f"min_gru, float32, B = 1, D = {rows[0]['shape'][2]}; "
        f"{machine['processor']}, {machine['threads']} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
