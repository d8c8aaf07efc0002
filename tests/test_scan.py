"""Values and first derivatives of every scan against float64, one step at a time."""

from __future__ import annotations

import math

import pytest
import torch
from backends import INTERPRETED, TRITON
from hypothesis import given
from hypothesis import strategies as st
from scans import (
    SCANS,
    Scan,
    gradients,
    norm_error,
    oracle,
    poison,
    reference,
    scans,
    shapes,
)
from torch import Tensor

import msrnn_ops as ms

# Norm-relative error that a dtype's outputs, and its gradients, may have: their own rounding.
VALUE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize("dtype", VALUE, ids=lambda d: str(d).removeprefix("torch."))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@scans
@shapes
@dtypes
@pytest.mark.parametrize(
    ("reverse", "with_h0"), [(False, False), (True, True)], ids=["zero", "reverse-h0"]
)
def test_against_float64(
    scan: Scan, shape: tuple[int, ...], dtype: torch.dtype, reverse: bool, with_h0: bool
) -> None:
    batch, _, channels = shape
    inputs = scan.inputs(*shape, dtype)
    h0 = torch.randn(batch, channels, dtype=accumulation(dtype)) if with_h0 else None
    weights = (torch.randn(shape).to(dtype).double(), torch.randn(batch, channels).double())
    if scan.name == "log_scan" and not with_h0 and shape[1] == 0:
        weights = (weights[0], torch.zeros_like(weights[1]))  # the last state is -inf
    poison()
    values, grads = gradients(scan, inputs, h0, weights, reverse=reverse)
    with reference():
        wide = [x.double() for x in inputs]
        exact, exact_grads = gradients(
            scan, wide, None if h0 is None else h0.double(), weights, reverse=reverse
        )
    assert values[0].dtype == dtype and values[1].dtype == accumulation(dtype)
    finite = exact[1].isfinite()
    assert torch.equal(values[1].isfinite(), finite)
    assert norm_error(values[0], exact[0]) <= VALUE[dtype]
    assert norm_error(values[1][finite], exact[1][finite]) <= min(
        VALUE[dtype], VALUE[torch.float32]
    )
    # 16-bit states are all that backward keeps: log_scan's differences of them lose most.
    slack = 8 if scan.name == "log_scan" else 1
    for x, grad, exact_grad in zip([*inputs, h0], grads, exact_grads, strict=False):
        assert grad.dtype == x.dtype
        assert norm_error(grad, exact_grad) <= slack * GRADIENT[dtype]


@scans
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("channels", [5, 140])
def test_packed_sequences_equal_separate_runs(scan: Scan, reverse: bool, channels: int) -> None:
    lengths = [3, 0, 1, 400, 64]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    inputs = scan.inputs(1, sum(lengths), channels, torch.float32)
    h0 = torch.randn(len(lengths), channels)
    weights = (torch.randn(1, sum(lengths), channels), torch.randn(len(lengths), channels))
    packed, packed_grads = gradients(
        scan, inputs, h0, weights, reverse=reverse, cu_seqlens=ends.long() if reverse else ends
    )
    start = 0
    for n, length in enumerate(lengths):
        stop = start + length
        own = [x[:, start:stop] for x in inputs]
        own_weights = (weights[0][:, start:stop], weights[1][n : n + 1])
        one, one_grads = gradients(scan, own, h0[n : n + 1], own_weights, reverse=reverse)
        torch.testing.assert_close(packed[0][:, start:stop], one[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(packed[1][n : n + 1], one[1], rtol=2e-6, atol=2e-6)
        for whole, part in zip(packed_grads[:-1], one_grads[:-1], strict=True):
            torch.testing.assert_close(whole[:, start:stop], part, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed_grads[-1][n : n + 1], one_grads[-1], rtol=1e-5, atol=1e-5)
        start = stop


@scans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_splitting_anywhere_and_passing_the_state_on(scan: Scan, dtype: torch.dtype) -> None:
    inputs = scan.inputs(2, 600, 100, dtype)
    whole, whole_last = scan(*inputs, torch.full((2, 100), 0.5), return_state=True)
    for at in (0, 1, 299, 600):
        first, state = scan(
            *(x[:, :at] for x in inputs), torch.full((2, 100), 0.5), return_state=True
        )
        second, last = scan(*(x[:, at:] for x in inputs), state, return_state=True)
        both = torch.cat([first, second], 1)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(both, whole, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(last, whole_last, rtol=1e-6, atol=1e-6)


@scans
def test_reverse_is_flip(scan: Scan) -> None:
    inputs = scan.inputs(2, 500, 100, torch.float32)
    h0 = torch.randn(2, 100)
    flipped = scan(*(x.flip(1) for x in inputs), h0).flip(1)
    # Triton compiles two kernels, and fuses products and sums in each as it likes.
    close = {"rtol": 1e-5, "atol": 1e-6} if TRITON else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(scan(*inputs, h0, reverse=True), flipped, **close)


def test_an_infinite_gate_of_min_lstm_closes_nothing_else() -> None:
    """sigma(inf) = 1 beside sigma(0) = 1/2, and a candidate of g(0) = 1/2."""
    for which, expected in enumerate((1 / 6, 1 / 3)):  # of forget, of input
        inputs = [torch.zeros(1, 1, 1) for _ in range(3)]
        inputs[which].fill_(torch.inf)
        assert ms.min_lstm(*inputs).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ["g", "identity"])
@dtypes
def test_steps_equal_the_parallel_form(activation: str, dtype: torch.dtype) -> None:
    time = 5 if INTERPRETED else 20
    gate, input, candidate = torch.randn(3, 3, time, 9).to(dtype)
    h0 = torch.rand(3, 9, dtype=accumulation(dtype))
    for function, step, inputs in (
        (ms.min_gru, ms.min_gru_step, (gate, candidate)),
        (ms.min_lstm, ms.min_lstm_step, (gate, input, candidate)),
    ):
        parallel, last = function(*inputs, h0, activation=activation, return_state=True)
        h = h0
        for t in range(time):
            h = step(*(x[:, t] for x in inputs), h, activation=activation)
            assert h.dtype == h0.dtype
            torch.testing.assert_close(h.to(dtype), parallel[:, t])
        torch.testing.assert_close(h, last)
    assert ms.min_gru_step(gate[:, 0], candidate[:, 0], h0.to(dtype)).dtype == dtype


def test_step_is_differentiable() -> None:
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(ms.min_lstm_step, inputs)
    assert torch.autograd.gradcheck(ms.min_gru_step, inputs[:3])


@pytest.mark.parametrize("scan", [s for s in SCANS if not s.joint], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "layout", ["time_major", "chunk", "channel_stride", "expanded", "offset", "flipped_strides"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_any_strides(scan: Scan, layout: str, dtype: torch.dtype) -> None:
    def strided(x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        if layout == "time_major":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "chunk":
            return torch.cat([x, x], -1).chunk(2, -1)[1]
        if layout == "channel_stride":
            wide = x.new_empty(batch, time, 3 * channels)
            wide[..., ::3] = x
            return wide[..., ::3]
        if layout == "expanded":
            return x[:, :1].expand(batch, time, channels)
        if layout == "offset":
            return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    inputs = [strided(x) for x in scan.inputs(3, 90, 35, dtype)]
    dense = [x.contiguous() for x in inputs]
    h0 = (
        strided(torch.randn(1, 3, 35))[0] if layout != "expanded" else torch.randn(35).expand(3, 35)
    )
    weights = (torch.randn(3, 90, 35), torch.randn(3, 35))
    values, grads = gradients(scan, dense, h0.contiguous(), weights)
    leaves = [x.detach().requires_grad_() for x in (*inputs, h0)]
    h, last = scan(*leaves, return_state=True)
    torch.testing.assert_close([h, last], values, rtol=0, atol=0)
    total = (h.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    torch.testing.assert_close(list(torch.autograd.grad(total, leaves)), grads, rtol=0, atol=0)


@scans
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sum"])
def test_any_strides_of_the_gradient(scan: Scan, kind: str) -> None:
    inputs = [x.requires_grad_() for x in scan.inputs(2, 50, 40, torch.float32)]
    h = scan(*inputs)
    grad = {
        "expanded": torch.randn(2, 1, 40).expand(2, 50, 40),
        "transposed": torch.randn(2, 40, 50).transpose(1, 2),
        "sum": torch.tensor(2.0).expand(2, 50, 40),
    }[kind]
    expected = torch.autograd.grad(h, inputs, grad.contiguous(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(h, inputs, grad), expected, rtol=0, atol=0)


@given(data=st.data())
def test_any_shape_stride_and_option(data: st.DataObject) -> None:
    scan = data.draw(st.sampled_from(SCANS), "scan")
    batch = data.draw(st.integers(1, 4), "B")
    time = data.draw(st.integers(0, 100) | st.integers(250, 400), "T")
    channels = data.draw(st.integers(1, 300), "D")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    scale = data.draw(st.sampled_from([1.0, 5.0, 50.0]), "scale")
    reverse = data.draw(st.booleans(), "reverse")
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    inputs = scan.inputs(batch, time, channels, dtype)
    if scan.name.startswith("min_"):
        inputs = [x * scale for x in inputs]
    if data.draw(st.booleans(), "time-major"):
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    options: dict[str, object] = {"reverse": reverse}
    count = batch
    if batch == 1 and data.draw(st.booleans(), "packed"):
        inner = sorted(data.draw(st.lists(st.integers(0, time), max_size=6), "ends"))
        options["cu_seqlens"] = torch.tensor([0, *inner, time])
        count = len(inner) + 1
    h0 = torch.randn(count, channels) if data.draw(st.booleans(), "h0") else None
    h = scan(*inputs, h0, **options)
    assert norm_error(h, oracle(scan, inputs, h0, **options)) <= VALUE[dtype]


@pytest.mark.threads
@scans
def test_runs_and_thread_counts_give_the_same_bits(scan: Scan) -> None:
    for shape in ((1, 5000, 16), (1, 900, 130), (3, 200, 400), (1, 300, 1500)):
        inputs = scan.inputs(*shape, torch.float32)
        weights = (torch.randn(shape), torch.randn(shape[0], shape[2]))
        h0 = torch.randn(shape[0], shape[2])
        first = gradients(scan, inputs, h0, weights)
        threads = torch.get_num_threads()
        try:
            for count in (threads, 1, 2, 5):
                torch.set_num_threads(count)
                again = gradients(scan, inputs, h0, weights)
                assert all(torch.equal(x, y) for x, y in zip(first[0], again[0], strict=True))
                assert all(torch.equal(x, y) for x, y in zip(first[1], again[1], strict=True))
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)


# Long sequences.


@pytest.mark.long
@pytest.mark.parametrize("mean", [0.0, -8.0], ids=["even", "slow"])
@pytest.mark.parametrize(
    "scan", [s for s in SCANS if s.name.startswith("min_")], ids=lambda s: s.name
)
def test_long_sequences_keep_their_precision(scan: Scan, mean: float) -> None:
    shape = (1, 8192, 4)
    inputs = [x + mean for x in scan.inputs(*shape, torch.float32)]
    if "lstm" in scan.name:
        parts = inputs[0].chunk(3, -1) if scan.joint else inputs
        inputs = [parts[0] - 2 * mean, parts[1], parts[2] - mean]
        inputs = [torch.cat(inputs, -1)] if scan.joint else inputs
    weights = (torch.randn(shape).double(), torch.randn(1, 4).double())
    h0 = torch.rand(1, 4)
    values, grads = gradients(scan, inputs, h0, weights)
    with reference():
        exact, exact_grads = gradients(scan, [x.double() for x in inputs], h0.double(), weights)
    # Signed states may cancel: what their terms add up to without a sign is what errors scale with.
    size = exact[0].abs()
    if "identity" in scan.name:
        *others, candidate = [x.double() for x in inputs]
        with reference():
            size = scan(*others, candidate.abs(), h0.double())
    assert ((values[0].double() - exact[0]).abs() / size).max().item() <= 1e-6
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert norm_error(grad, exact_grad) <= 1e-6


# Closed forms.


@pytest.mark.many_steps
def test_log_scan_of_one_over_t_ends_in_log_one() -> None:
    for time in (1, 10, 5000, 200000):
        log_b = torch.full((1, time, 2), -math.log(time))
        log_h = ms.log_scan(torch.zeros(1, time, 2), log_b)
        assert log_h[0, -1].abs().max().item() <= 2e-6


@pytest.mark.many_steps
def test_log_scan_far_beyond_the_range_of_exp() -> None:
    time = 5000
    log_h = ms.log_scan(torch.zeros(1, time, 1), torch.full((1, time, 1), 1000.0))
    exact = 1000 + torch.arange(1, time + 1, dtype=torch.float64).log()
    assert ((log_h[0, :, 0] - exact).abs() / exact).max().item() <= 2e-7


def test_constant_gate_is_a_geometric_series() -> None:
    gate = torch.full((1, 50, 1), 0.3)
    a = torch.sigmoid(torch.tensor(-0.3, dtype=torch.float64))
    h = ms.min_gru(gate, torch.full((1, 50, 1), 2.0), activation="identity")
    exact = 2.0 * (1 - a ** torch.arange(1, 51))
    assert ((h[0, :, 0] - exact).abs() / exact).max().item() <= 3e-7


@pytest.mark.many_steps
def test_linear_scan_of_ones_counts() -> None:
    ones = torch.ones(2, 3000, 5)
    assert torch.equal(ms.linear_scan(ones, ones)[0, :, 0], torch.arange(1.0, 3001.0))


# Extremes.

EXTREMES = [1e4, -1e4, 100.0, -100.0, 88.0, -88.0, 30.0, -30.0, 0.0, -0.0, 1e-30, -1e-30]


@pytest.mark.parametrize("start", [0.0, -3.0, 1e30])
def test_saturated_gates_are_exact(start: float) -> None:
    values = torch.tensor(EXTREMES)
    grid = torch.cartesian_prod(values, values)
    gate, candidate = grid.view(1, -1, 1, 2).unbind(-1)
    h0 = torch.full((1, 1), start)
    gru = Scan("min_gru", ms.min_gru, ())
    exact = oracle(gru, [gate, candidate], h0)
    h = ms.min_gru(gate, candidate, h0)
    torch.testing.assert_close(h.double(), exact, rtol=1e-6, atol=1e-30)
    lstm = Scan("min_lstm", ms.min_lstm, ())
    for inputs in ([gate, candidate, gate.flip(1)], [gate, gate, candidate]):
        exact = oracle(lstm, inputs, h0)
        torch.testing.assert_close(ms.min_lstm(*inputs, h0).double(), exact, rtol=2e-6, atol=1e-30)


def test_gradients_of_saturated_gates_are_exact() -> None:
    """d sigma = sigma(x) sigma(-x), formed so that neither factor cancels.

    PyTorch's own sigmoid backward, s (1 - s), is 0 from |x| = 37 on even in float64: the truth is
    written out here.
    """
    gate = torch.linspace(-80, 80, 161, dtype=torch.float64)
    candidate, h0 = torch.randn(161, dtype=torch.float64), torch.rand(161, dtype=torch.float64)
    gate32, candidate32, h32 = (x.float().view(1, 1, -1) for x in (gate, candidate, h0))
    gate32.requires_grad_()
    ms.min_gru(gate32, candidate32, h32[0]).sum().backward()
    c = candidate32.double().view(-1)
    phi = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
    slope = torch.sigmoid(gate) * torch.sigmoid(-gate)
    exact = phi - h32.double().view(-1)
    assert gate32.grad is not None
    torch.testing.assert_close(gate32.grad.view(-1) / slope, exact, rtol=2e-6, atol=5e-7)


def test_gradients_at_zero_are_finite() -> None:
    for scan in SCANS:
        inputs = [torch.zeros_like(x).requires_grad_() for x in scan.inputs(1, 5, 4, torch.float32)]
        h0 = torch.zeros(1, 4, requires_grad=True)
        grads = torch.autograd.grad(scan(*inputs, h0).sum(), [*inputs, h0])
        assert all(g.isfinite().all() for g in grads), scan.name
    log_b = torch.full((1, 5, 4), -torch.inf).requires_grad_()
    log_b.data[:, 3] = 0.0
    grads = torch.autograd.grad(ms.log_scan(torch.zeros(1, 5, 4), log_b)[:, -1].sum(), log_b)
    assert grads[0].isfinite().all() and grads[0][0, 3, 0] == 1


@scans
@pytest.mark.parametrize(
    "channels",
    [16, pytest.param(140, marks=pytest.mark.large), pytest.param(1100, marks=pytest.mark.large)],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_nan_and_infinity_propagate_as_in_the_reference(
    scan: Scan, channels: int, bad: float
) -> None:
    parts = 1 if not scan.joint else len(scan.draw)
    for which in range(len(scan.draw)):
        shape = (1, 40 if channels > 1000 else 400 if channels > 100 else 60, channels)
        inputs = scan.inputs(*shape, torch.float32)
        place = which * channels + 3 if parts > 1 else 3
        inputs[0 if parts > 1 else which][0, 20, place] = bad
        grad = torch.randn(shape)
        results = []
        for wide in (False, True):
            leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
            if wide:
                with reference():
                    h = scan(*leaves)
            else:
                h = scan(*leaves)
            results.append(h.detach())
        ours, exact = results
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.equal(ours.isinf(), exact.isinf())
        fine = exact.isfinite()
        assert norm_error(ours[fine], exact[fine]) <= 1e-6
        assert torch.equal(ours[~fine & ~exact.isnan()].double(), exact[~fine & ~exact.isnan()])
        # Other channels never notice, backward either.
        clean = [x.detach().clone() for x in inputs]
        clean[0 if parts > 1 else which][0, 20, place] = 0.5
        others = torch.arange(channels) != 3
        got = _input_gradients(scan, inputs, grad)
        want = _input_gradients(scan, clean, grad)
        for x, y in zip(got, want, strict=True):
            x, y = (v.unflatten(-1, (-1, channels))[..., others] for v in (x, y))
            assert norm_error(x, y.double()) <= 1e-6


def _input_gradients(scan: Scan, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(scan(*leaves), leaves, grad)


def test_infinite_state_stays_infinite_while_the_gate_is_open() -> None:
    gate = torch.full((1, 30, 20), -3.0)
    h = ms.min_gru(gate, torch.zeros(1, 30, 20), torch.full((1, 20), torch.inf))
    assert h.eq(torch.inf).all()


def test_growing_products_out_of_range_fall_back_to_a_walk() -> None:
    a = torch.full((1, 6000, 4), 1.5)
    a[:, ::2] = 0.5
    h = ms.linear_scan(a, torch.zeros(1, 6000, 4), torch.ones(1, 4))
    exact = ms.linear_scan(a.double(), torch.zeros(1, 6000, 4).double(), torch.ones(1, 4).double())
    torch.testing.assert_close(h.double(), exact, rtol=1e-4, atol=1e-37)
    a = torch.full((1, 4000, 4), 1.2)
    h = ms.linear_scan(a, torch.zeros(1, 4000, 4), torch.full((1, 4), 1e-30))
    exact = ms.linear_scan(
        a.double(), torch.zeros_like(a).double(), torch.full((1, 4), 1e-30).double()
    )
    assert torch.equal(h.isinf(), exact > torch.finfo(torch.float32).max)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_is_left_of_a_state_that_is_forgotten(dtype: torch.dtype) -> None:
    a, b = torch.rand(1, 130, 130) / 100 + 0.99, 1e5 * torch.randn(1, 130, 130)
    a[:, 120], b[:, 120:] = 0, 0
    h, last = ms.linear_scan(a.to(dtype), b.to(dtype), return_state=True)
    assert h[:, 119].any() and not h[:, 120:].any() and not last.any()


def test_float16_overflow_is_infinite_and_tiny_values_survive() -> None:
    h = ms.linear_scan(torch.ones(1, 3, 17).half(), torch.full((1, 3, 17), 40000.0).half())
    assert h[:, 0].eq(40000).all() and h[:, 1:].isinf().all()
    tiny = torch.full((1, 2, 17), 6e-8).half()
    assert torch.equal(ms.linear_scan(torch.zeros_like(tiny), tiny), tiny)
