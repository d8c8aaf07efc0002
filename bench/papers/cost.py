"""What a training step costs against sequence length: the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.progress import track
from torch import Tensor, nn

from bench import peers
from bench.cuda.gpu import Gpu
from bench.measure import Timing, interleaved, peak_bytes
from bench.papers.models import MIXERS
from bench.papers.part import Options, Plot, Section, Store
from bench.table import Table, duration, number

NAME = "cost"
PAPER = {512: 175, 4096: 1324}  # nn.GRU's time over minGRU's at T, batch 64, on a T4
_PAPER_MEMORY = 1.88  # minGRU's over nn.GRU's
_UNFUSED = "minGRU in PyTorch"


@dataclass(frozen=True)
class Setting:
    batch: int
    width: int
    lengths: tuple[int, ...]
    seconds: float  # of timing for each layer and length


QUICK = Setting(4, 128, (256, 512, 1024, 2048, 4096), 0.3)
FULL = Setting(64, 128, (256, 512, 1024, 2048, 4096), 1.0)


class _Unfused(nn.Module):
    """minGRU as the paper's code computes it: in log-space, by cumulative sums."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 2 * width)
        self.scan = peers.heinsen(peers.OPS["min_gru"])

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(*self.projection(x).chunk(2, -1))


LAYERS: dict[str, Callable[[int], nn.Module]] = {**MIXERS, _UNFUSED: _Unfused}


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, down to the parameters and the layer's input."""
    wanted = (x, *layer.parameters())
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def _measure(setting: Setting, length: int, device: str) -> dict[str, Any]:
    """Time and peak memory of each layer's training step, of those that fit in memory."""
    torch.manual_seed(0)
    x = torch.randn(setting.batch, length, setting.width, device=device, requires_grad=True)
    calls = {}
    for name, layer in LAYERS.items():
        calls[name] = _training_step(layer(setting.width).to(device), x)
    gpu = Gpu(torch.device(device)) if x.is_cuda else None
    peaks: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call()  # warms up
            peaks[name] = gpu.peak_bytes(call) if gpu else peak_bytes(call)
        except torch.OutOfMemoryError:
            continue
    calls = {name: calls[name] for name in peaks}
    timings: dict[str, Timing]
    if gpu:
        timings = gpu.interleaved(calls, setting.seconds, cold=False)
    else:
        timings = interleaved(calls, setting.seconds)
    return {name: {"time": timings[name], "peak": peaks[name]} for name in peaks}


def run(options: Options, store: Store) -> dict[str, Any]:
    setting = FULL if options.full else QUICK
    measured = {
        str(length): store.once(str(length), _measure, setting, length, options.device)
        for length in track(setting.lengths, "cost, lengths")
    }
    return {"setting": vars(setting), "device": options.device, "lengths": measured}


def _over(row: dict[str, Any], name: str, other: str, what: str) -> float:
    """What a layer takes over what another takes, of "time" or "peak"."""
    values = [row[layer][what] for layer in (name, other)]
    first, second = (x["median"] if what == "time" else x for x in values)
    return first / second


def _cells(result: dict[str, Any], what: str) -> list[list[str]]:
    setting = result["setting"]
    rows = []
    for name in LAYERS:
        cells = []
        for length, row in result["lengths"].items():
            if name not in row:
                cells.append("out of memory")
            elif what == "time":
                ratio = number(_over(row, name, "minGRU", what))
                cells.append(f"{duration(row[name]['time'])} ({ratio}×)")
            else:
                tensor = 4 * setting["batch"] * int(length) * setting["width"]
                mebibytes = number(row[name]["peak"] / 2**20)
                cells.append(f"{mebibytes} MiB ({row[name]['peak'] / tensor:.1f})")
        rows.append([name, *cells])
    return rows


def _plot(result: dict[str, Any]) -> Callable[[Sequence[Axes]], None]:
    def onto(axes: Sequence[Axes]) -> None:
        ticks = [int(length) for length in result["lengths"]]
        for name in LAYERS:
            rows = [(int(t), row[name]) for t, row in result["lengths"].items() if name in row]
            lengths = [length for length, _ in rows]
            axes[0].plot(
                lengths, [1e3 * row["time"]["median"] for _, row in rows], "o-", label=name
            )
            axes[1].plot(lengths, [row["peak"] / 2**20 for _, row in rows], "o-")
        axes[0].set_ylabel("time of a training step (ms)")
        axes[1].set_ylabel("peak memory of a training step (MiB)")
        axes[0].legend(frameon=False, fontsize=8)
        for one in axes:
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            one.set_xlabel("sequence length T")

    return onto


def section(result: dict[str, Any]) -> Section:
    setting, lengths = result["setting"], result["lengths"]
    against = []
    for length, row in lengths.items():
        ratio = number(_over(row, "GRU", "minGRU", "time"))
        paper = f" (paper: {PAPER[int(length)]:,})" if int(length) in PAPER else ""
        against.append(f"{ratio} at T = {int(length):,}{paper}")
    found = f"nn.GRU takes so many times minGRU's time: {', '.join(against)}."
    longest, row = list(lengths.items())[-1]
    if _UNFUSED in row:
        unfused, fused = (number(_over(row, x, "GRU", "peak")) for x in (_UNFUSED, "minGRU"))
        found += (
            f" At T = {int(longest):,} minGRU written in PyTorch takes {unfused} times nn.GRU's "
            f"peak memory (paper: {_PAPER_MEMORY}), the fused one {fused} times."
        )
    shape = f"{setting['batch']}×T×{setting['width']}, float32, {result['device']}"
    columns = ("layer", *(f"T = {int(length):,}" for length in lengths))
    return Section(
        title="The cost of training",
        claim="On a T4 at batch 64 a training step of minGRU takes 1/175 of nn.GRU's time at "
        "T = 512 and 1/1324 at T = 4096, for 88 % more memory.",
        found=found,
        comparable=(
            "On a processor nn.GRU is not held up by a launch for every step, so its time grows "
            "with T as minGRU's does and the paper's factors cannot show; which tensors minGRU "
            "keeps, fused or not, is the same on a GPU, but nn.GRU keeps fewer there."
            if result["device"] == "cpu"
            else "Batch and lengths are the paper's, the GPU and the width are not; nn.GRU here "
            "is cuDNN's."
        ),
        tables=[
            Table(
                "Time of a training step",
                f"{shape}; forward and backward of one layer with its projections; median ± half "
                "the interquartile range; in brackets over minGRU's.",
                columns,
                _cells(result, "time"),
            ),
            Table(
                "Peak memory of a training step",
                f"{shape}; above what the inputs and parameters take; in brackets in tensors of "
                "B·T·D float32. The selective scan has 16 states for each of 2 D channels, which "
                "Mamba's own kernel never writes to memory.",
                columns,
                _cells(result, "peak"),
            ),
        ],
        plots=[Plot("step", "A training step against sequence length.", _plot(result), columns=2)],
    )
