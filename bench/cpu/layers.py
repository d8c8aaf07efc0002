"""The part ``layers``: a projection and its scan, against PyTorch's recurrent layers."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure import Entries, interleaved
from bench.peers import Shape, layer_pass, layers
from bench.table import dimensions, running, say_times

_SHAPES: tuple[Shape, ...] = ((8, 512, 256), (1, 4096, 1024))


def run(seconds: float, full: bool) -> Entries:
    rows: list[dict[str, Any]] = []
    for shape in _SHAPES if full else _SHAPES[:1]:
        label = f"layers {dimensions(shape)} forward and backward"
        with running(label):
            torch.manual_seed(0)
            x = torch.randn(shape, requires_grad=True)
            calls = {k: layer_pass(*layer, x) for k, layer in layers(shape[-1]).items()}
            for call in calls.values():
                call()
            times = interleaved(calls, seconds)
        rows.append({"shape": shape, "layers": times})
        say_times(label, {k: {"time": v} for k, v in times.items()}, "minGRU, joint")
        yield {"layers": rows}
