"""Shapes and numbers beyond (B, T, D) of real inputs: broadcasting, more dimensions, complex."""

from __future__ import annotations

import pytest
import torch
from scans import SCANS, Scan, poison, reference, scans
from torch import Tensor

import msrnn_ops as ms

plain_scans = pytest.mark.parametrize(
    "scan", [scan for scan in SCANS if not scan.joint], ids=lambda scan: scan.name
)


def assert_same(got: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> None:
    for x, y in zip(got, right, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance)


def call(function: object, leaves: list[Tensor], *args: Tensor, **options: object) -> list[Tensor]:
    """h, the last state, and the gradients of the leaves."""
    assert callable(function)
    h, last = function(*args, return_state=True, **options)
    total = h.sin().sum() + last.cos().sum()
    return [h.detach(), last.detach(), *torch.autograd.grad(total, leaves)]


@plain_scans
@pytest.mark.parametrize(
    "shape", [(3, 9, 1), (1, 9, 5), (9, 5), (1, 1, 5), (9, 1), (1,) * 3], ids=str
)
def test_an_input_that_broadcasts_equals_its_expansion(scan: Scan, shape: tuple[int, ...]) -> None:
    inputs = scan.inputs(3, 9, 5, torch.float32)
    for i in range(len(inputs)):
        index = tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)
        small = inputs[i][(0, *index) if len(shape) == 2 else index].clone().requires_grad_()
        given = [*inputs[:i], small, *inputs[i + 1 :]]
        right = call(scan, [small], *(x.expand(3, 9, 5).contiguous() for x in given))
        poison()
        assert_same(call(scan, [small], *given), right)


@scans
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 3, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_any_dimensions_before_time(scan: Scan, leading: tuple[int, ...], reverse: bool) -> None:
    rows = torch.Size(leading).numel()
    flat = [x.requires_grad_() for x in scan.inputs(rows, 7, 4, torch.float32)]
    h0, resets = torch.randn(rows, 4, requires_grad=True), torch.rand(rows, 7) < 0.3
    options = {"reverse": reverse}
    right = call(scan, [*flat, h0], *flat, h0, resets=resets, **options)
    shaped = [x.reshape(*leading, *x.shape[1:]) for x in flat]
    shape = (*leading, 4)
    mask = resets.reshape(*leading, 7)
    got = call(scan, [*flat, h0], *shaped, h0.reshape(shape), resets=mask, **options)
    assert got[0].shape == (*leading, 7, 4) and got[1].shape == shape
    assert_same([got[0].reshape(right[0].shape), got[1].reshape(rows, 4), *got[2:]], right)


@scans
def test_packed_sequences_without_a_batch(scan: Scan) -> None:
    inputs = scan.inputs(1, 9, 4, torch.float32)
    ends, h0 = torch.tensor([0, 4, 4, 7]), torch.randn(3, 4)
    h, last = scan(*(x[0] for x in inputs), h0, cu_seqlens=ends, return_state=True)
    right, right_last = scan(*inputs, h0, cu_seqlens=ends, return_state=True)
    assert torch.equal(h, right[0]) and torch.equal(last, right_last)


def test_steps_broadcast_and_take_any_dimensions() -> None:
    gate, candidate, h = torch.randn(2, 3, 1), torch.randn(3, 4), torch.randn(2, 3, 4)
    got = ms.min_gru_step(gate, candidate, h)
    flat = [x.expand(2, 3, 4).reshape(6, 4) for x in (gate, candidate, h)]
    assert torch.equal(got, ms.min_gru_step(*flat).reshape(2, 3, 4))
    assert ms.min_lstm_step(*torch.randn(4, 5).unbind()).shape == (5,)


def draw_complex(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["single", "double"])
def test_complex_linear_scan(reverse: bool, packed: bool, dtype: torch.dtype) -> None:
    """Values, gradients and second derivatives, at a decay of 0 too, against the plain loop."""
    rows = 1 if packed else 3
    a, b, h0 = draw_complex(rows, 40, 5) * 0.6, draw_complex(rows, 40, 5), draw_complex(3, 5)
    a[:, 7] = 0
    options: dict[str, object] = {"reverse": reverse, "resets": torch.rand(rows, 40) < 0.1}
    if packed:
        options["cu_seqlens"] = torch.tensor([2, 2, 20, 36])
    results = []
    for wide in (False, True):
        leaves = [x.to(torch.complex128 if wide else dtype).requires_grad_() for x in (a, b, h0)]
        poison()
        if wide:
            with reference():
                h, last = ms.linear_scan(*leaves, return_state=True, **options)
        else:
            h, last = ms.linear_scan(*leaves, return_state=True, **options)
        total = (h * h.conj() * (1 + h.real)).real.sum() + (last.imag * last.real).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.abs().square().sum() for x in first), leaves)
        results.append([h, last, *first, *second])
    for x, y in zip(*results, strict=True):
        assert x.dtype == dtype
        scale = y.abs().max().item() + 1e-3
        assert (x - y).abs().max().item() < scale * (1e-5 if dtype == torch.complex64 else 1e-12)


def test_complex_numbers_do_not_leak_and_do_not_lose_their_phase() -> None:
    a = torch.polar(torch.ones(1, 100_000, 1), torch.full((1, 100_000, 1), 3.0))
    b = torch.zeros_like(a)
    b[:, 0] = 1
    h = ms.linear_scan(a, b)
    assert abs(h[0, -1, 0].item() - a[0, 0, 0].to(torch.complex128).pow(99_999).item()) < 0.02
    a[:, 10], b[:, 5] = torch.nan, torch.inf
    h = ms.linear_scan(a, b, resets=torch.arange(100_000)[None] == 50)
    assert h[0, 50:].isfinite().all() and not h[0, 10:50].isfinite().any()


def test_complex_forward_mode_and_vmap() -> None:
    a, b, t = (draw_complex(2, 6, 3) for _ in range(3))
    with reference():
        right = torch.func.jvp(lambda x: ms.linear_scan(x, b), (a,), (t,))[1]
        twice = torch.func.jvp(
            lambda y: torch.func.jvp(lambda x: ms.linear_scan(x, x), (y,), (t,))[1], (a,), (t,)
        )[1]
    got = torch.func.jvp(lambda x: ms.linear_scan(x, b), (a,), (t,))[1]
    torch.testing.assert_close(got, right)
    got = torch.func.jvp(
        lambda y: torch.func.jvp(lambda x: ms.linear_scan(x, x), (y,), (t,))[1], (a,), (t,)
    )[1]
    torch.testing.assert_close(got, twice)
    rows = torch.func.vmap(ms.linear_scan)(a[:, None], b[:, None])[:, 0]
    torch.testing.assert_close(rows, ms.linear_scan(a, b))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_complex_numbers_compiled(backend: str) -> None:
    """A lazy conjugation would be lost there, without a word."""
    torch._dynamo.reset()
    a, b, h0 = draw_complex(2, 6, 3) * 0.6, draw_complex(2, 6, 3), draw_complex(2, 3)
    leaves = [x.requires_grad_() for x in (a, b, h0)]

    def run(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        h, last = ms.linear_scan(a, b, h0, return_state=True)
        return h.abs().square().sum() + last.real.sum()

    got = torch.compile(run, fullgraph=True, backend=backend)(*leaves)
    with reference():
        right = run(*leaves)
    torch.testing.assert_close(got, right)
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (got, right)), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y)


def test_complex_operator() -> None:
    a, b, h0 = draw_complex(2, 6, 3), draw_complex(2, 6, 3), draw_complex(2, 3)
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    resets = torch.rand(2, 6) < 0.3
    torch.library.opcheck(
        torch.ops.msrnn_ops.complex_linear_scan.default, (*leaves, None, resets, True)
    )
