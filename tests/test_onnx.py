"""Programs without operators of this package, and what ONNX makes of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msrnn_ops as ms
from msrnn_ops.onnx import decompositions

DYNAMIC = torch.export.Dim.DYNAMIC
SCANS: dict[str, Any] = {
    "linear_scan": lambda x, resets: ms.linear_scan(x, x, resets=resets, return_state=True),
    "decay_scan": lambda x, resets: ms.decay_scan(-x.abs(), x, x[:, 0], return_state=True),
    "log_scan": lambda x, resets: ms.log_scan(x, x, resets=resets, reverse=True, return_state=True),
    "min_gru": lambda x, resets: ms.min_gru(x, x, resets=resets, reverse=True, return_state=True),
    "min_lstm": lambda x, resets: ms.min_lstm(x, x, x, activation="identity", return_state=True),
    "min_gru_joint": lambda x, resets: ms.min_gru_joint(x, resets=resets, return_state=True),
    "min_lstm_joint": lambda x, resets: ms.min_lstm_joint(x, reverse=True, return_state=True),
}


class Module(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = ms.nn.MinGRU(6, 4, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, resets: Tensor) -> Any:
        if self.name == "layer":
            return self.layer(x, resets=resets, valid=~resets)
        return SCANS[self.name](x, resets)


def decomposed(name: str) -> tuple[nn.Module, torch.export.ExportedProgram]:
    module = Module(name).eval()
    inputs = (torch.randn(2, 7, 6), torch.rand(2, 7) < 0.3)
    axes = {0: DYNAMIC, 1: DYNAMIC}
    program = torch.export.export(module, inputs, dynamic_shapes=(axes, axes))
    return module, program.run_decompositions(decompositions())


@pytest.mark.parametrize("name", [*SCANS, "layer"])
def test_a_program_without_our_operators_computes_the_same(name: str) -> None:
    module, program = decomposed(name)
    assert "msrnn_ops" not in str(program.graph)
    for rows, time in ((2, 7), (3, 12)):
        x, resets = torch.randn(rows, time, 6), torch.rand(rows, time) < 0.3
        got, right = program.module()(x, resets), module(x, resets)
        torch.testing.assert_close(tuple(got), tuple(right), rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_refused() -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return ms.min_gru(x, x, cu_seqlens=ends)

    program = torch.export.export(Packed(), (torch.randn(1, 5, 2), torch.tensor([0, 2, 5])))
    with pytest.raises(Exception, match="min_gru: expected no cu_seqlens in a program for ONNX"):
        program.run_decompositions(decompositions())


@pytest.mark.filterwarnings("ignore")  # that exporter is deprecated
def test_the_exporter_by_traces_is_told_the_way() -> None:
    layer, x = ms.nn.MinGRU(6, 4).eval(), torch.randn(2, 7, 6)
    with pytest.raises(
        RuntimeError, match=r"MinGRU: expected torch\.onnx\.export with dynamo=True"
    ):
        torch.onnx.export(layer, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("name", [*SCANS, "layer"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, program = decomposed(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    for rows, time in ((2, 7), (3, 12)):
        values = torch.randn(rows, time, 6), torch.rand(rows, time) < 0.3
        named = zip(session.get_inputs(), values, strict=False)  # resets that nobody uses are none
        found = session.run(None, {place.name: x.numpy() for place, x in named})
        right = [x.detach().numpy() for x in module(*values)]
        for x, y in zip(found, right, strict=True):
            assert abs(x - y).max() < 1e-5
