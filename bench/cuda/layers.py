"""The part ``layers``: a projection and its scan, against cuDNN's recurrent layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from bench.cuda.gpu import DTYPES, Call, Gpu, failed, name_of, release
from bench.measure import Entries
from bench.peers import Shape, layer_pass, layers
from bench.table import dimensions, say_times

SHAPES: tuple[Shape, ...] = ((8, 512, 256), (8, 4096, 1024), (1, 4096, 1024))


def _row(
    gpu: Gpu, shape: Shape, dtype: torch.dtype, backward: bool, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = gpu.randn(*shape).to(dtype).requires_grad_()
    with gpu.device:
        modules = layers(shape[-1])
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, (module, after) in modules.items():
        try:
            call = layer_pass(module.to(dtype), after, x, backward=backward)
            call()
            calls[name], graph = gpu.captured(call)
        except Exception as problem:
            results[name] = failed(name, problem)
        else:
            results[name] = {"graph": graph}
    for name, taken in gpu.interleaved(calls, seconds).items():
        results[name]["time"] = taken
    which = "forward + backward" if backward else "forward"
    return {"shape": shape, "dtype": name_of(dtype), "pass": which, "layers": results}


def run(gpu: Gpu, seconds: float) -> Entries:
    """Products in float32 may use TF32: cuDNN's own default, here of every layer alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    rows: list[dict[str, Any]] = []
    for shape, dtype, backward in itertools.product(SHAPES, DTYPES, (False, True)):
        rows.append(row := _row(gpu, shape, dtype, backward, seconds))
        label = f"layers {dimensions(shape)} {row['dtype']} {row['pass']}"
        say_times(label, row["layers"], "minGRU, joint")
        yield {"layers": rows}
        release()
    torch.set_float32_matmul_precision(before)
