"""Export to ONNX: the scans as the ``scan`` of PyTorch, which torch.onnx writes as ONNX's Scan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from msrnn_ops import backend
from msrnn_ops.operators.scan import LOG, RECURRENCES, Recurrence
from msrnn_ops.reference import accumulation_dtype

__all__ = ["decompositions"]


def _step_by_step(op: Recurrence, *args: Any) -> tuple[Tensor, Tensor]:
    """The operator, one step of the reference at a time; its arguments are those of the schema."""
    n = len(op.inputs)
    h0, cu_seqlens, resets, reverse, *flags = args[n:]
    if cu_seqlens is not None:
        raise ValueError(f"{op.name}: expected no cu_seqlens in a program for ONNX, got some")
    inputs = args[:n] if op.parts == 1 else args[0].chunk(op.parts, -1)
    dtype = inputs[0].dtype
    by_time = [x.to(accumulation_dtype(dtype)).transpose(0, 1) for x in inputs]
    start = torch.full_like(by_time[0][0], op.start)
    cut = torch.zeros_like(by_time[0][..., :1], dtype=torch.bool)
    if resets is not None:  # the border before a step lies behind it where the scan is reversed
        cut = resets.t().unsqueeze(-1)
        cut = F.pad(cut[1:], (0, 0, 0, 0, 0, 1)) if reverse else cut
    one = partial(op.step, activation="identity" if flags[0] else "g") if flags else op.step

    def step(h: Tensor, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        *now, fresh = x
        nothing = torch.full_like(h, -torch.inf) if op is LOG else torch.zeros_like(h)
        h = one(torch.where(fresh, nothing, h), tuple(now))
        return h, h.clone()

    steps = [x.flip(0) if reverse else x for x in (*by_time, cut)]
    # What an earlier op has compiled must not make sizes of this one inputs of its body.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        last, h = scan(step, start if h0 is None else h0.contiguous(), steps)
    h = h.flip(0) if reverse else h
    return h.transpose(0, 1).to(dtype), last


def decompositions() -> dict[Any, Callable[..., tuple[Tensor, Tensor]]]:
    """What ``ExportedProgram.run_decompositions`` takes to leave no operator of this package.

    Each scan becomes ``torch.ops.higher_order.scan`` over the steps of the plain recurrence, which
    torch.onnx.export writes as ONNX's ``Scan``; that needs onnx and onnxscript. The time axis may
    be dynamic.

    Returns:
        The operators and their decompositions, which raise ValueError for packed sequences.

    Source: ONNX's operator Scan.

    >>> import torch, msrnn_ops as ms
    >>> from msrnn_ops.onnx import decompositions
    >>> model = ms.nn.MinGRU(4, 5, batch_first=True)
    >>> dynamic = torch.export.Dim.DYNAMIC
    >>> shapes = {"input": {0: dynamic, 1: dynamic}}
    >>> program = torch.export.export(model, (torch.randn(2, 7, 4),), dynamic_shapes=shapes)
    >>> program = program.run_decompositions(decompositions())
    >>> torch.onnx.export(program, dynamo=True).save("model.onnx")  # doctest: +SKIP
    """
    return {
        getattr(getattr(torch.ops, namespace), op.name).default: partial(_step_by_step, op)
        for namespace in backend.LIBRARIES
        for op in RECURRENCES
    }
