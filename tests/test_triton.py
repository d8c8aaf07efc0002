"""Triton's kernels as far as no GPU is needed: the plan, the choice, and what they avoid.

Values are checked by the tests of all backends, on Triton's interpreter: MSRNN_BACKEND=triton
TRITON_INTERPRET=1; on a GPU with MSRNN_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import fresh_python
from torch.utils._python_dispatch import TorchDispatchMode

import msrnn_ops as ms
from msrnn_ops import backend

FOLDER = Path(ms.__file__).parent / "triton_kernels"
INSTALLED = importlib.util.find_spec("triton") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
usable = pytest.mark.skipif(ms.backends()["triton"] != "ok", reason="Triton cannot be used here")


@installed
def test_importing_the_package_does_not_import_triton() -> None:
    code = "import torch, sys; before = 'triton' in sys.modules; import msrnn_ops as ms; {}"
    code += "; print(before or 'triton' not in sys.modules, ms.backends()['triton'])"
    assert fresh_python(code.format("0"), TRITON_INTERPRET="1") == "True ok"
    if not torch.cuda.is_available():
        assert fresh_python(code.format("0")) == "True torch finds no GPU"


@pytest.mark.skipif(ms.backends()["triton"] == "ok", reason="Triton can be used here")
def test_a_machine_without_it_says_why() -> None:
    reason = "Triton is not installed" if not INSTALLED else "torch finds no GPU"
    assert ms.backends()["triton"] == reason
    with pytest.raises(ValueError, match=f"'triton' cannot be used: {reason}"):
        ms.use_backend("triton").__enter__()


class Called(TorchDispatchMode):
    """Notes the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace.startswith("msrnn"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@usable
def test_a_block_chooses_it_and_each_call_remembers() -> None:
    gate = torch.randn(1, 4, 3, requires_grad=True)
    with ms.use_backend("triton"):
        h = ms.min_gru(gate, gate)
    with Called() as called, ms.use_backend("cpu"):
        h.sum().backward()
        if not gate.is_cuda:
            ms.min_gru(gate.detach(), gate.detach())
    expected = ["msrnn_triton::min_gru_backward", "msrnn_ops::min_gru"]
    assert called.names == expected[: 1 if gate.is_cuda else 2]


@usable
def test_the_environment_chooses_it() -> None:
    code = "import torch, msrnn_ops as ms; from msrnn_ops import backend; print(backend._chosen)"
    interpreted = {k: v for k, v in os.environ.items() if k == "TRITON_INTERPRET"}
    assert fresh_python(code, MSRNN_BACKEND="triton", **interpreted) == "triton"


@usable
def test_direct_calls_are_checked() -> None:
    x, resets = torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)
    ops = torch.ops.msrnn_triton
    for call in (
        lambda: ops.min_gru(x, x[:, :3], None, None, None, False, False),
        lambda: ops.min_gru(x, x.double(), None, None, None, False, False),
        lambda: ops.min_gru_joint(x, None, None, None, False, False),
        lambda: ops.min_gru(x, x, x[0], None, None, False, False),
        lambda: ops.min_gru(x, x, None, None, resets[:, :3], False, False),
        lambda: ops.min_gru(x, x, None, None, resets.int(), False, False),
        lambda: ops.min_gru_backward(x, None, x, x, x[:, :2], None, None, None, False, False),
        lambda: ops.min_gru_backward(x[:, :2], None, x, x, x, None, None, None, False, False),
        lambda: ops.min_gru_backward(x, None, x, x, x, None, None, resets[:, :3], False, False),
    ):
        with pytest.raises(RuntimeError, match=r"^expected"):
            call()


@usable
@pytest.mark.skipif(any(FOLDER.parent.glob("_cuda*.so")), reason="the CUDA library was built")
def test_without_a_cuda_library_the_operators_for_cuda_are_tritons() -> None:
    for name in ("min_gru", "min_gru_backward", "linear_scan", "attend_evict", "attend_sequence"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.COMPILED}::{name}", "CUDA")


def test_no_kernel_scans_in_reverse_or_in_more_than_one_grid_axis() -> None:
    """`reverse` of associative_scan has been wrong (triton-lang/triton#4362)."""
    scans = 0
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "program_id":  # 2^31 - 1 programs; other axes end at 65535
                    assert [x.value for x in node.args if isinstance(x, ast.Constant)] == [0]
                if node.func.attr in ("associative_scan", "cumsum", "cumprod"):
                    scans += 1
                    assert len(node.args) == 3 and not node.keywords, ast.unparse(node)
    assert scans >= 5


if ms.backends()["triton"] == "ok":
    from msrnn_ops.triton_kernels import multi_state, scan

    @given(
        rows=st.integers(1, 64),
        time=st.integers(1, 300_000),
        channels=st.integers(1, 5000),
        size=st.sampled_from([2, 4, 8]),
        inputs=st.sampled_from([2, 3]),
        backward=st.booleans(),
        marked=st.booleans(),
    )
    def test_a_scan_plan_covers_its_shape(
        rows: int, time: int, channels: int, size: int, inputs: int, backward: bool, marked: bool
    ) -> None:
        plan = scan.plan(backward, size, inputs, marked, rows, time, channels)
        assert (plan.chunks - 1) * plan.chunk_steps < time <= plan.chunks * plan.chunk_steps
        assert plan.chunk_steps % (plan.segments * plan.rows) == 0
        assert plan.form == "chunks" or plan.chunks == 1

    @given(
        rows=st.integers(1, 300),
        kv_heads=st.integers(1, 16),
        sharing=st.integers(1, 40),
        slots=st.integers(2, 200_000),
        head_dim=st.integers(1, 32).map(lambda n: 8 * n),
        size=st.sampled_from([2, 4]),
        per_head=st.booleans(),
    )
    def test_a_step_plan_covers_its_state(
        rows: int, kv_heads: int, sharing: int, slots: int, head_dim: int, size: int, per_head: bool
    ) -> None:
        groups = kv_heads if per_head else 1
        plan = multi_state.plan(rows, kv_heads * sharing, kv_heads, groups, slots, head_dim, size)
        assert (plan.splits - 1) * plan.split_slots < slots <= plan.splits * plan.split_slots
        assert (plan.parts - 1) * plan.part_slots < slots <= plan.parts * plan.part_slots
        assert plan.split_slots % plan.tile.slots == 0 and plan.block_d >= head_dim

    @pytest.mark.parametrize("cell", [ms.nn.MinGRU, ms.nn.MinLSTM], ids=lambda x: x.__name__)
    @pytest.mark.parametrize("ends", [None, [1, 4, 4, 12]])
    def test_layers_in_chunks(cell: type[Any], ends: list[int] | None) -> None:
        """The layer's operator of Triton's namespace walks chunks of Triton's scans."""
        device = torch.get_default_device()
        whole, chunked = (
            cell(5, 6, batch_first=True, bidirectional=True, chunk=n, device=device)
            for n in (None, 4)
        )
        chunked.load_state_dict(whole.state_dict())
        x = torch.randn(1, 13, 5, device=device, requires_grad=True)
        cu_seqlens = None if ends is None else torch.tensor(ends, device=device)
        with ms.use_backend("triton"):
            outputs = [layer(x, cu_seqlens=cu_seqlens)[0] for layer in (whole, chunked)]
        grad = torch.randn_like(outputs[0])
        for layer, output in zip((whole, chunked), outputs, strict=True):
            layer.found = (output, *torch.autograd.grad(output, (x, *layer.parameters()), grad))
        for found, expected in zip(chunked.found, whole.found, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
