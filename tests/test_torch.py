"""What PyTorch builds on a scan: higher derivatives, transforms, compile, export, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import EMULATED
from scans import SCANS, Scan, norm_error, scans
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from transforms import Seen

import msrnn_ops as ms

OPS = torch.ops.msrnn_ops


def small(scan: Scan, time: int = 5) -> tuple[list[Tensor], Tensor]:
    inputs = [x.requires_grad_() for x in scan.inputs(2, time, 3, torch.float64)]
    return inputs, torch.randn(2, 3, dtype=torch.float64, requires_grad=True)


@scans
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_first_and_second_derivatives(scan: Scan, reverse: bool) -> None:
    inputs, h0 = small(scan)

    def function(*x: Tensor) -> Tensor:
        return scan(*x, reverse=reverse, return_state=True)

    assert gradcheck(function, [*inputs, h0], check_forward_ad=True)
    assert gradgradcheck(function, [*inputs, h0])
    packed = torch.tensor([0, 2, 2, 5])
    inputs = [x.detach()[:1].requires_grad_() for x in inputs]
    h0 = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def of_packed(*x: Tensor) -> Tensor:
        return scan(*x, reverse=reverse, cu_seqlens=packed, return_state=True)

    assert gradcheck(of_packed, [*inputs, h0], check_forward_ad=True)
    assert gradgradcheck(of_packed, [*inputs, h0])


@scans
def test_second_derivatives_without_h0_and_at_t_0(scan: Scan) -> None:
    inputs, h0 = small(scan)
    assert gradgradcheck(lambda *x: scan(*x), inputs)
    empty = [x.detach()[:, :0].requires_grad_() for x in inputs]
    _, last = scan(*empty, h0, return_state=True)
    (grad,) = torch.autograd.grad(last.sum(), h0, create_graph=True)
    assert torch.equal(grad, torch.ones_like(h0))


@scans
def test_torch_func(scan: Scan) -> None:
    inputs, h0 = small(scan)
    inputs, h0 = [x.detach() for x in inputs], h0.detach()

    def loss(*x: Tensor) -> Tensor:
        return scan(*x).square().sum()

    where = tuple(range(len(inputs) + 1))
    leaves = [x.clone().requires_grad_() for x in (*inputs, h0)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=where)(*inputs, h0)
    torch.testing.assert_close(got, expected)

    tangents = tuple(torch.randn_like(x) for x in (*inputs, h0))
    _, tangent = torch.func.jvp(loss, (*inputs, h0), tangents)
    exact = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(tangent, exact)

    stacked = [torch.stack([x, 2 * x, -x]) for x in (*inputs, h0)]
    if scan.name in ("decay_scan", "log_scan"):
        stacked[0] = -stacked[0].abs()
    rows = [scan(*(x[i] for x in stacked)) for i in range(3)]
    torch.testing.assert_close(torch.vmap(scan.function)(*stacked), torch.stack(rows))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=where))(*stacked)
    for got_one, i in zip(per_sample, where, strict=True):
        assert got_one.shape == stacked[i].shape
    hessian = torch.func.hessian(lambda x: loss(x, *inputs[1:], h0))(inputs[0])
    reverse = torch.func.jacrev(torch.func.grad(lambda x: loss(x, *inputs[1:], h0)))(inputs[0])
    torch.testing.assert_close(hessian, reverse)


@scans
def test_vmap_over_packed_sequences(scan: Scan) -> None:
    """The batch lies beside the channels, wherever it lay."""
    ends, resets = torch.tensor([0, 2, 2, 5]), torch.rand(1, 6) < 0.3
    batch = [scan.inputs(1, 6, 3, torch.float64) for _ in range(4)]
    h0 = torch.randn(4, 3, 3, dtype=torch.float64)
    options = {"cu_seqlens": ends, "resets": resets, "return_state": True}
    right = [scan(*inputs, h, **options) for inputs, h in zip(batch, h0, strict=True)]
    stacked = [torch.stack(x, -1) for x in zip(*batch, strict=True)]
    got = torch.vmap(lambda *x: scan(*x, **options), (*[-1] * len(stacked), 0))(*stacked, h0)
    for x, y in zip(got, zip(*right, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y))


@scans
def test_forward_mode_without_torch_func(scan: Scan) -> None:
    inputs, h0 = small(scan)
    inputs = [x.detach() for x in inputs]
    tangent = torch.randn_like(inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangent)
        h = scan(dual, *inputs[1:], h0.detach())
        got = torch.autograd.forward_ad.unpack_dual(h).tangent
    step = 1e-6
    numeric = scan(inputs[0] + step * tangent, *inputs[1:], h0) - scan(
        inputs[0] - step * tangent, *inputs[1:], h0
    )
    torch.testing.assert_close(got, numeric.detach() / (2 * step), rtol=1e-5, atol=1e-7)


def op_arguments(scan: Scan) -> tuple[torch.OpOverload, tuple[object, ...]]:
    name = scan.name.removesuffix("_identity")
    flags = (scan.name.endswith("_identity"),) if name.startswith("min_") else ()
    inputs = [x.requires_grad_() for x in scan.inputs(2, 6, 3, torch.float32)]
    h0 = torch.randn(2, 3, requires_grad=True)
    return getattr(OPS, name).default, (*inputs, h0, None, None, False, *flags)


@scans
def test_opcheck(scan: Scan) -> None:
    op, arguments = op_arguments(scan)
    torch.library.opcheck(op, arguments)
    without = list(arguments)
    without[len(scan.draw) if not scan.joint else 1] = None
    torch.library.opcheck(op, tuple(without))
    packed = [x[:1].detach() if isinstance(x, Tensor) and x.dim() == 3 else x for x in arguments]
    position = 1 if scan.joint else len(scan.draw)
    packed[position] = torch.randn(2, 3)
    packed[position + 1] = torch.tensor([0, 2, 5])
    torch.library.opcheck(op, tuple(packed))
    cut = list(arguments)
    cut[position + 2] = torch.rand(2, 6) < 0.4
    torch.library.opcheck(op, tuple(cut))


@scans
def test_opcheck_backward(scan: Scan) -> None:
    op, arguments = op_arguments(scan)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    h, last = op(*detached)
    backward = getattr(OPS, f"{op._opname}_backward").default
    kept = 1 if scan.name in ("linear_scan", "decay_scan") or scan.joint else len(scan.draw)
    rest = detached[1 if scan.joint else len(scan.draw) :]
    for grads in ((torch.randn_like(h), torch.randn_like(last)), (None, last), (h, None)):
        torch.library.opcheck(backward, (*grads, *detached[:kept], h, *rest))


def test_direct_calls_are_differentiable_and_safe() -> None:
    op, arguments = op_arguments(SCANS[3])
    h, _ = op(*arguments)
    assert h.requires_grad
    with pytest.raises(RuntimeError, match="one shape"):
        OPS.min_gru(torch.ones(1, 2, 3), torch.ones(1, 2, 4), None, None, None, False, False)
    with pytest.raises(RuntimeError, match="state of shape"):
        x = torch.ones(1, 2, 3)
        OPS.min_gru(x, x, torch.ones(2, 3), None, None, False, False)
    x = torch.ones(1, 8, 3)
    for ends in ([0, 100], [-5, 3, 8], [0, 5, 3, 8], [9]):
        if EMULATED:  # a GPU's kernels do not wait to see the values
            h, last = OPS.linear_scan(x, x, None, torch.tensor(ends), None, False)
            assert h.shape == x.shape and last.shape == (len(ends) - 1, 3)
            continue
        with pytest.raises(RuntimeError, match="cu_seqlens from 0 to T = 8, not to decrease"):
            OPS.linear_scan(x, x, None, torch.tensor(ends), None, False)
    with pytest.raises(RuntimeError, match=r"resets \(B, T\) of bool"):
        OPS.linear_scan(x, x, None, None, torch.ones(1, 7, dtype=torch.bool), False)


@scans
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(scan: Scan, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        h, last = scan(*(v * 1.0 for v in x), return_state=True)
        return h * 2, last

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for batch, time in ((2, 7), (3, 11)) if dynamic else ((2, 7),):
        inputs = [x.requires_grad_() for x in scan.inputs(batch, time, 5, torch.float32)]
        h0 = torch.randn(batch, 5, requires_grad=True)
        results = []
        for call in (function, compiled):
            h, last = call(*inputs, h0)
            grads = torch.autograd.grad(h.square().sum() + last.sum(), [*inputs, h0])
            results.append([h, last, *grads])
        torch.testing.assert_close(*results)


def test_compile_with_packed_sequences_and_reverse() -> None:
    x, ends = torch.randn(2, 1, 9, 5), torch.tensor([0, 4, 4, 9], dtype=torch.int32)

    def function(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return ms.min_gru(a, b, cu_seqlens=ends, reverse=True)

    got = torch.compile(function, fullgraph=True)(*x, ends)
    torch.testing.assert_close(got, function(*x, ends))


@scans
def test_export(scan: Scan) -> None:
    class Module(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return scan(*x)

    inputs = scan.inputs(2, 6, 5, torch.float32)
    time = torch.export.Dim("time", min=2, max=100)
    program = torch.export.export(
        Module(), tuple(inputs), dynamic_shapes=(tuple({1: time} for _ in inputs),)
    )
    longer = scan.inputs(2, 30, 5, torch.float32)
    torch.testing.assert_close(program.module()(*longer), scan(*longer))


def test_autocast_promotes_inputs_and_leaves_h0() -> None:
    gate, candidate = torch.randn(1, 5, 4).bfloat16(), torch.randn(1, 5, 4)
    h0 = torch.randn(1, 4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert ms.min_gru(gate, gate, h0).dtype == torch.bfloat16
        assert ms.min_gru(candidate, candidate, h0).dtype == torch.float32
        mixed = ms.min_gru(gate, candidate, h0.bfloat16())
    torch.testing.assert_close(mixed, ms.min_gru(gate.float(), candidate, h0.bfloat16().float()))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        gates = torch.nn.Linear(4, 8)(candidate)
        h, last = ms.min_gru_joint(gates, h0, return_state=True)
    assert h.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 5, 3, device="meta", dtype=torch.bfloat16)
    h, last = ms.min_gru(x, x, return_state=True)
    assert h.shape == (2, 5, 3) and h.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert h.device.type == "meta"


@scans
def test_only_what_backward_needs_is_kept(scan: Scan) -> None:
    kept: list[Tensor] = []
    inputs = [x.requires_grad_() for x in scan.inputs(2, 6, 3, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        h = scan(*inputs)
    pointers = {x.data_ptr() for x in kept}
    allowed = {x.data_ptr() for x in inputs} | {h.data_ptr()}
    assert pointers <= allowed
    if scan.name in ("linear_scan", "decay_scan"):
        assert inputs[1].data_ptr() not in pointers


def test_gradients_of_a_part_of_the_inputs() -> None:
    gate, candidate = torch.randn(2, 1, 6, 3)
    h0 = torch.randn(1, 3, requires_grad=True)
    (only_h0,) = torch.autograd.grad(ms.min_gru(gate, candidate, h0).sum(), h0)
    a = torch.sigmoid(-gate.double()).cumprod(1).sum(1)
    assert norm_error(only_h0, a) < 1e-6
    _, last = ms.min_gru(gate, candidate, h0, return_state=True)
    (from_last,) = torch.autograd.grad(last.sum(), h0)
    assert norm_error(from_last, torch.sigmoid(-gate.double()).prod(1)) < 1e-6


def test_modules_that_use_ops_can_be_copied() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return ms.min_gru_joint(self.projection(x))

    layer = Layer()
    x = torch.randn(1, 4, 3)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@scans
@torch.no_grad()
def test_the_short_way_to_a_kernel(scan: Scan) -> None:
    """It is taken only by tensors that lie in memory as they are, where nobody watches."""
    inputs, h0 = scan.inputs(2, 5, 3, torch.float32), torch.randn(2, 3)
    name = scan.name.removesuffix("_identity")
    expected = scan(*inputs, h0)
    negated = [torch._neg_view(-x) for x in inputs]
    assert all(x.is_neg() for x in negated)
    assert torch.equal(scan(*negated, torch._neg_view(-h0)), expected)
    zeros = [torch._efficientzerotensor(x.shape) for x in inputs]
    assert torch.equal(scan(*zeros), scan(*map(torch.zeros_like, inputs)))
    with Seen() as mode:
        scan(*inputs, h0)
    assert [x for x in mode.names if x.startswith("msrnn")] == [f"msrnn_ops.{name}.default"]
    with torch.profiler.profile() as found:
        scan(*inputs, h0)
    assert any(event.key == f"msrnn_ops::{name}" for event in found.key_averages())
    traced = torch.jit.trace(lambda *x: scan(*x), (*inputs, h0), check_trace=False)
    others = scan.inputs(2, 5, 3, torch.float32)
    assert torch.equal(traced(*others, h0), scan(*others, h0))


def test_tensors_that_only_the_dispatcher_can_read() -> None:
    """They lie elsewhere than a plain tensor of their type, or nowhere."""
    x = torch.rand(1, 3, 4)
    with pytest.raises((NotImplementedError, TypeError)):
        ms.linear_scan(x.to_mkldnn(), x.to_mkldnn())
    with pytest.raises((NotImplementedError, TypeError)):
        ms.linear_scan(x, x, torch.rand(2, 4).to_mkldnn()[:1])
    expected = ms.linear_scan(x, x)
    functional = torch._to_functional_tensor(x.clone())
    found = ms.linear_scan(functional, functional)
    assert torch.equal(torch._from_functional_tensor(found), expected)
    meta = torch.rand(1, 3, 4, device="meta")
    h, _ = OPS.linear_scan(x, meta, None, None, None, False)  # no kernel: the fake one
    assert h.shape == x.shape


def test_a_wrapper_that_left_its_transform_has_a_gradient() -> None:
    x, left = torch.rand(1, 3, 4, requires_grad=True), []
    torch.func.grad(lambda y: (left.append(y), (y * 2).sum())[1])(x)
    ms.linear_scan(left[0], left[0]).sum().backward()
    expected = torch.autograd.grad(ms.linear_scan(x, x).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_a_trace_before_dispatch_has_the_backward_pass() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(ms.linear_scan(x, x).sum(), x)[0]

    x = torch.rand(1, 3, 4, requires_grad=True)
    graph = make_fx(gradient, pre_dispatch=True)(x)
    assert any("linear_scan_backward" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), gradient(x))
