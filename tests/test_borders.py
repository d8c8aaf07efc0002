"""Where states start and end within time: resets, and cu_seqlens that leave steps uncovered.

Every backend runs these tests: values and first derivatives against the plain loop in float64, NaN
where nothing may be read, and every element of every output written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from backends import EMULATED, INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from scans import SCANS, Scan, norm_error, poison, reference, scans
from torch import Tensor

import msrnn_ops as ms

# Few channels and many steps: tiles of time side by side; more channels; a walk over many tiles of
# the emulated kernels (the CPU's and the interpreter's cut smaller).
_LONG = 150 if INTERPRETED else 1100 if EMULATED else 300
SHAPES = {
    "short": (3, 23, 9),
    "side-by-side": (1, _LONG, 5),
    "rows": (2, 60 if INTERPRETED else 150, 70),
}
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
directions_and_states = pytest.mark.parametrize(
    ("reverse", "with_h0"),
    [(False, True), (True, True), (True, False)],
    ids=["forward-h0", "reverse-h0", "reverse-zero"],
)


def _sparse(batch: int, time: int) -> Tensor:
    resets = torch.rand(batch, time) < 2 / max(time, 1)
    resets[:, time // 2] = True
    return resets


def _first(batch: int, time: int) -> Tensor:
    resets = torch.zeros(batch, time, dtype=torch.bool)
    resets[0, 0] = True
    return resets


RESETS: dict[str, Callable[[int, int], Tensor]] = {
    "sparse": _sparse,
    "dense": lambda batch, time: torch.rand(batch, time) < 0.5,
    "all": lambda batch, time: torch.ones(batch, time, dtype=torch.bool),
    "first": _first,
}


def _run(
    scan: Scan,
    inputs: Sequence[Tensor],
    h0: Tensor | None,
    grads: Sequence[Tensor],
    options: dict[str, object],
) -> list[Tensor]:
    """h, last, and the gradients of inputs and h0 where h and last have the gradients `grads`."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *([] if h0 is None else [h0]))]
    state = None if h0 is None else leaves[-1]
    poison()
    h, last = scan(*leaves[: len(inputs)], state, return_state=True, **options)
    outputs = [torch.stack([0 * x.sum() for x in leaves]).sum()]  # where nothing else ties them
    given = [torch.ones_like(outputs[0])]
    for x, grad in zip((h, last), grads, strict=True):
        if x.requires_grad:
            outputs.append(x)
            given.append(grad.to(x.dtype))
    poison()
    return [h.detach(), last.detach(), *torch.autograd.grad(outputs, leaves, given)]


def _oracle(
    scan: Scan,
    inputs: Sequence[Tensor],
    h0: Tensor | None,
    grads: Sequence[Tensor],
    options: dict[str, object],
) -> list[Tensor]:
    """The same in float64, one step at a time."""
    with reference():
        wide = None if h0 is None else h0.double()
        return _run(scan, [x.double() for x in inputs], wide, grads, options)


def _compare(scan: Scan, actual: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Values and gradients of float32: no old memory, no NaN, the right infinities."""
    names = ["h", "last", *("gradient" for _ in exact[2:])]
    for name, x, y in zip(names, actual, exact, strict=True):
        finite = y.isfinite()
        assert torch.equal(x.double()[~finite], y[~finite]), (name, scan.name)
        assert norm_error(x[finite], y[finite]) <= 2e-6, (name, scan.name)


def _gradients_of(scan: Scan, shape: Sequence[int], count: int, exact_last: Tensor) -> list[Tensor]:
    grads = [torch.randn(*shape), torch.randn(count, shape[2])]
    grads[1][exact_last.isinf()] = 0.0  # log 0
    return grads


def _check(
    scan: Scan,
    shape: tuple[int, int, int],
    count: int,
    with_h0: bool,
    options: dict[str, object],
) -> None:
    inputs = scan.inputs(*shape, torch.float32)
    h0 = torch.randn(count, shape[2]) if with_h0 else None
    with reference(), torch.no_grad():
        wide = None if h0 is None else h0.double()
        _, last = scan(*(x.double() for x in inputs), wide, return_state=True, **options)
    grads = _gradients_of(scan, shape, count, last)
    actual = _run(scan, inputs, h0, grads, options)
    _compare(scan, actual, _oracle(scan, inputs, h0, grads, options))


@scans
@directions_and_states
@pytest.mark.parametrize(
    ("kind", "name"),
    [("sparse", name) for name in SHAPES]
    + [("dense", "side-by-side"), ("all", "short"), ("first", "short")],
)
def test_resets_against_float64(
    scan: Scan, name: str, reverse: bool, with_h0: bool, kind: str
) -> None:
    shape = SHAPES[name]
    resets = RESETS[kind](*shape[:2])
    _check(scan, shape, shape[0], with_h0, {"resets": resets, "reverse": reverse})


def _lengths(time: int) -> list[int]:
    """Of sequences that leave steps uncovered on both sides; some are empty."""
    return [0, 1, time // 3, 0, 2, time // 4, 0]


def _packed(time: int, lead: int, lengths: Sequence[int]) -> Tensor:
    ends = torch.tensor([lead, *lengths]).cumsum(0)
    assert ends[-1] <= time
    return ends


@scans
@directions_and_states
@pytest.mark.parametrize(("kind", "channels"), [(None, 70), ("sparse", 5), ("dense", 70)])
def test_packed_sequences_and_resets_against_float64(
    scan: Scan, reverse: bool, with_h0: bool, kind: str | None, channels: int
) -> None:
    shape = (1, _LONG if channels < 10 else 120, channels)
    lengths = _lengths(shape[1])
    ends = _packed(shape[1], 7, lengths)
    options: dict[str, object] = {"reverse": reverse}
    options["cu_seqlens"] = ends if reverse else ends.int()
    if kind is not None:
        options["resets"] = resets = RESETS[kind](*shape[:2])
        if kind == "sparse":  # the first step of one sequence, the one behind another
            resets[0, int(ends[2])] = resets[0, int(ends[5])] = True
    _check(scan, shape, len(lengths), with_h0, options)


def _spoil(x: Tensor, where: Tensor) -> Tensor:
    """NaN at these steps (B, T)."""
    return x.masked_fill(where[..., None], torch.nan)


@scans
@directions_and_states
@pytest.mark.parametrize("channels", [5, 70])
def test_what_no_sequence_covers_is_zero_and_never_read(
    scan: Scan, reverse: bool, with_h0: bool, channels: int
) -> None:
    time = _LONG if channels < 10 else 100
    lengths = _lengths(time)
    ends = _packed(time, time // 5, lengths)
    step = torch.arange(time)
    outside = ((step < ends[0]) | (step >= ends[-1]))[None]
    inputs = scan.inputs(1, time, channels, torch.float32)
    h0 = torch.randn(len(lengths), channels) if with_h0 else None
    options: dict[str, object] = {"reverse": reverse, "cu_seqlens": ends}
    grads = [torch.randn(1, time, channels), torch.randn(len(lengths), channels)]
    if scan.name == "log_scan" and h0 is None:  # the last state of an empty sequence is log 0
        grads[1][torch.tensor(lengths) == 0] = 0.0
    clean = _run(scan, inputs, h0, grads, options)
    spoilt = _run(
        scan,
        [_spoil(x, outside) for x in inputs],
        h0,
        [_spoil(grads[0], outside), grads[1]],
        options,
    )
    for x, y in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    for x in (spoilt[0], *spoilt[2 : 2 + len(inputs)]):
        assert not x[outside].any() and not x[outside].isnan().any()
    assert spoilt[0][~outside].all()


@scans
@directions
def test_no_sequence_at_all_is_zeros(scan: Scan, reverse: bool) -> None:
    for ends, shape in (([0], (1, 9, 5)), ([4], (1, 40, 70)), ([0], (1, 0, 5))):
        inputs = [torch.full_like(x, torch.nan) for x in scan.inputs(*shape, torch.float32)]
        options = {"reverse": reverse, "cu_seqlens": torch.tensor(ends)}
        grads = [torch.full(shape, torch.nan), torch.zeros(0, shape[2])]
        for h0 in (None, torch.zeros(0, shape[2])):
            h, last, *found = _run(scan, inputs, h0, grads, options)
            assert last.shape == (0, shape[2])
            for x in (h, *found[: len(inputs)]):
                assert torch.equal(x, torch.zeros_like(x))


@scans
@directions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("channels", [5, 70])
def test_nothing_leaks_across_a_reset(scan: Scan, reverse: bool, bad: float, channels: int) -> None:
    """What is NaN or infinite before a border stays on its side, in states and gradients."""
    time = 60 if channels > 10 or INTERPRETED else _LONG
    border = time // 2 + 1
    resets = torch.zeros(2, time, dtype=torch.bool)
    resets[:, border] = True
    inputs = scan.inputs(2, time, channels, torch.float32)
    grads = [torch.randn(2, time, channels), torch.randn(2, channels)]
    h0 = torch.randn(2, channels)
    options = {"reverse": reverse, "resets": resets}
    clean = _run(scan, inputs, h0, grads, options)
    step = torch.arange(time)
    for side in (step < border, step >= border):
        last_is_bad = bool(side[0 if reverse else -1])
        for of_gradient in (False, True):
            spoilt = [x.clone() for x in inputs]
            spoilt_grads = [x.clone() for x in grads]
            for x in spoilt_grads[:1] if of_gradient else spoilt:
                x[:, side] = bad
            actual = _run(scan, spoilt, h0, spoilt_grads, options)
            fine = [x[:, ~side] for x in (actual[0], *actual[2:-1])]
            right = [x[:, ~side] for x in (clean[0], *clean[2:-1])]
            if not last_is_bad:
                fine.append(actual[1])
                right.append(clean[1])
            else:  # then the initial state is on the good side
                fine.append(actual[-1])
                right.append(clean[-1])
            for x, y in zip(fine, right, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_where_a_reset_lies() -> None:
    """By hand: a = 1/2, b = 1, h0 = 8, a reset at t = 2; the gradient of h is 1 everywhere."""
    for reverse, at, h, last, grad_h0, grad_b in (
        (False, 2, [5.0, 3.5, 1.0, 1.5], 1.5, 0.75, [1.5, 1.0, 2.0, 2.0]),
        (True, 2, [1.5, 1.0, 3.5, 5.0], 1.5, 0.75, [2.0, 2.0, 1.0, 1.5]),
        # At the first step: forward h0 is not used, in reverse nothing changes.
        (False, 0, [1.0, 1.5, 1.75, 1.875], 1.875, 0.0, [2.0] * 4),
        (True, 0, [2.375, 2.75, 3.5, 5.0], 2.375, 1.0, [2.0] * 4),
    ):
        a = torch.full((1, 4, 1), 0.5)
        b = torch.ones(1, 4, 1, requires_grad=True)
        h0 = torch.full((1, 1), 8.0, requires_grad=True)
        resets = torch.zeros(1, 4, dtype=torch.bool)
        resets[0, at] = True
        found, found_last = ms.linear_scan(
            a, b, h0, reverse=reverse, resets=resets, return_state=True
        )
        assert found.flatten().tolist() == h and found_last.item() == last
        ones = torch.ones(1, 4, 1)
        grads = torch.autograd.grad([found, found_last], [b, h0], [ones, torch.ones(1, 1)])
        assert grads[0].flatten().tolist() == grad_b
        assert grads[1].item() == grad_h0


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every-second", "rows-expanded"])
@directions
def test_resets_of_any_strides(layout: str, reverse: bool) -> None:
    batch, time, channels = 3, 40, 20
    dense = torch.rand(batch, time) < 0.3
    if layout == "expanded":
        dense = torch.tensor([[True]]).expand(batch, time)
    if layout == "rows-expanded":
        dense = dense[:1].expand(batch, time)
    resets = {
        "expanded": lambda: dense,
        "rows-expanded": lambda: dense,
        "transposed": lambda: dense.t().contiguous().t(),
        "every-second": lambda: dense.repeat_interleave(2, 1)[:, ::2],
    }[layout]()
    gate, candidate = torch.randn(2, batch, time, channels)
    leaves = [gate.requires_grad_(), candidate.requires_grad_()]
    found, wanted = (
        torch.autograd.grad(ms.min_gru(*leaves, reverse=reverse, resets=x).sum(), leaves)
        for x in (resets, dense.contiguous())
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["log_scan", "min_gru", "min_lstm_joint"])
@directions
def test_other_dtypes(dtype: torch.dtype, name: str, reverse: bool) -> None:
    scan = next(s for s in SCANS if s.name == name)
    time = _LONG // 2
    resets = _sparse(1, time)
    ends = _packed(time, 3, _lengths(time))
    inputs = scan.inputs(1, time, 7, dtype)
    options = {"resets": resets, "cu_seqlens": ends, "reverse": reverse}
    grads = [torch.randn(1, time, 7).to(dtype), torch.zeros(len(ends) - 1, 7)]
    actual = _run(scan, inputs, None, grads, options)
    exact = _oracle(scan, inputs, None, grads, options)
    tolerance = {torch.float64: 1e-13, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    for x, y in zip(actual, exact, strict=True):
        finite = y.isfinite()
        assert torch.equal(x.isfinite(), finite)
        assert norm_error(x[finite], y[finite]) <= tolerance


@given(data=st.data())
def test_any_borders(data: st.DataObject) -> None:
    scan = data.draw(st.sampled_from(SCANS), "scan")
    time = data.draw(st.integers(1, 40) | st.integers(1, _LONG), "T")
    channels = data.draw(st.sampled_from([1, 4, 9, 33]), "D")
    batch = data.draw(st.integers(1, 3), "B")
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    options: dict[str, object] = {"reverse": data.draw(st.booleans(), "reverse")}
    count = batch
    if data.draw(st.booleans(), "packed"):
        batch = 1
        ends = sorted(data.draw(st.lists(st.integers(0, time), min_size=1, max_size=6), "ends"))
        options["cu_seqlens"] = torch.tensor(ends)
        count = len(ends) - 1
    density = data.draw(st.sampled_from([None, 0.02, 0.2, 1.0]), "resets")
    if density is not None:
        options["resets"] = torch.rand(batch, time) < density
    with_h0 = data.draw(st.booleans(), "h0")
    _check(scan, (batch, time, channels), count, with_h0, options)


@pytest.mark.skipif(
    not (EMULATED or INTERPRETED or torch.get_default_device().type == "cuda"),
    reason="on the CPU these values are an error",
)
@scans
@directions
def test_wrong_ends_leave_nothing_unwritten(scan: Scan, reverse: bool) -> None:
    """Where nobody waits for the values of cu_seqlens, they may be anything."""
    time = 60
    inputs = scan.inputs(1, time, 9, torch.float32)
    for ends in ([0, 50, 10, 60], [60, 0], [-7, 20, 99], [30, 30, 5], [90, 95, 99], [-9, -5, -2]):
        flags = (
            (scan.function.keywords["activation"] == "identity",) if "identity" in scan.name else ()
        )
        if scan.name.startswith("min_") and not flags:
            flags = (False,)
        name = scan.name.removesuffix("_identity")
        count = len(ends) - 1
        rest = (None, torch.tensor(ends), None, reverse, *flags)
        found = []
        for filler in (torch.nan, 3.0):  # what memory held must not be seen
            for size in (1 << 8, 1 << 12, 1 << 16):
                del_ = [torch.full((size,), filler) for _ in range(8)]
                del del_
            operators = torch.ops.msrnn_triton if INTERPRETED else torch.ops.msrnn_ops
            h, last = getattr(operators, name)(*inputs, *rest)
            saved = inputs[:1] if name in ("linear_scan", "decay_scan") else inputs
            grads = getattr(operators, f"{name}_backward")(
                torch.ones_like(h), torch.ones(count, 9), *saved, h, *rest
            )
            found.append([h, last, *grads])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=False)
