"""The CPU's operators on 64-bit Arm: csrc/cpu as a cross compiler builds it, run by an emulator.

PyTorch has no build that an emulator could run, so tests/arm/runtime.cpp stands in for that part of
it that the operators call. ``make arm`` builds the driver and names it, with its emulator, in
MSRNN_TEST_ARM. What comes back is compared with the operators in float64 on this machine, and for
multi-state attention with the reference.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scans import norm_error
from torch import Tensor

import msrnn_ops as ms
from msrnn_ops import reference
from msrnn_ops.state import restore

DRIVER = shlex.split(os.environ.get("MSRNN_TEST_ARM", ""))
pytestmark = pytest.mark.skipif(not DRIVER, reason="make arm sets MSRNN_TEST_ARM")

OPS = torch.ops.msrnn_ops
CODES = {
    torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.float64: 7,
    torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def packed(x: Tensor) -> bytes:
    """A tensor of cases: its memory from the first element to the last, and how it lies there."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    memory = x.as_strided((extent if x.numel() else 0,), (1,)).contiguous()
    data = memory.view(torch.uint8).numpy().tobytes()
    head = struct.pack("<ii", CODES[x.dtype], x.dim())
    return head + struct.pack(f"<{2 * x.dim()}qq", *x.shape, *x.stride(), len(data)) + data


def case(op: Any, args: Sequence[Any]) -> bytes:
    schema = op._schema
    name = schema.name.split("::")[1].encode()
    found = [struct.pack("<I", len(name)), name, struct.pack("<I", len(args))]
    for argument, x in zip(schema.arguments, args, strict=True):
        if x is None:
            found.append(b"\0")
        elif isinstance(x, Tensor):
            optional = isinstance(argument.type, torch.OptionalType)
            found.append(bytes([1 + optional]) + packed(x))
        elif isinstance(x, bool):
            found.append(bytes([5, x]))
        elif isinstance(x, int):
            found.append(struct.pack("<Bq", 3, x))
        else:
            found.append(struct.pack("<Bd", 4, x))
    return b"".join([*found, struct.pack("<I", len(schema.returns))])


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{layout}")
        self.at += size
        return struct.unpack(f"<{layout}", self.data[self.at - size : self.at])

    def tensor(self) -> Tensor:
        code, dims = self.take("ii")
        *shape, size = self.take(f"{dims}qq")
        memory = bytearray(self.data[self.at : self.at + size])
        self.at += size
        if not size:
            return torch.empty(shape, dtype=DTYPES[code])
        return torch.frombuffer(memory, dtype=DTYPES[code]).view(shape)


def run(folder: Path, calls: Sequence[tuple[Any, Sequence[Any]]], threads: int) -> list[Any]:
    """Of each call its outputs and then its tensors, or the words of an error."""
    cases, results = folder / "cases", folder / f"results-{threads}"
    cases.write_bytes(b"".join(case(*call) for call in calls))
    subprocess.run([*DRIVER, str(cases), str(results), str(threads)], check=True, timeout=900)
    reader, found = Reader(results.read_bytes()), []
    for op, args in calls:
        if not reader.take("B")[0]:
            (length,) = reader.take("I")
            reader.at += length
            found.append(bytes(reader.data[reader.at - length : reader.at]).decode())
            continue
        tensors = len(op._schema.returns) + sum(isinstance(x, Tensor) for x in args)
        found.append([reader.tensor() for _ in range(tensors)])
    assert reader.at == len(reader.data)
    return found


def on_arm(folder: Path, calls: Sequence[tuple[Any, Sequence[Any]]]) -> list[list[Tensor]]:
    """The results, which do not depend on the number of threads."""
    once, again = run(folder, calls, 1), run(folder, calls, 3)
    for one, other in zip(once, again, strict=True):
        assert not isinstance(one, str), one
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
    return once


def wide(args: Sequence[Any]) -> list[Any]:
    """Floating tensors in float64, in memory of their own."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.double() if x.is_floating_point() else x.clone()

    return [one(x) for x in args]


def check(x: Tensor, exact: Tensor, times: float = 1.0) -> None:
    """Off by little more than the exact numbers, rounded, are; log 0 is where it is."""
    assert torch.equal(x.isinf(), exact.isinf())
    exact = exact.nan_to_num(neginf=0)
    limit = EXACT[torch.float64 if x.dtype == torch.float64 else torch.float32]
    if x.dtype in (torch.bfloat16, torch.float16):
        limit += 1.05 * norm_error(exact.to(x.dtype), exact)
    assert norm_error(x.nan_to_num(neginf=0), exact) < times * limit


DRAWN: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "linear_scan": (torch.tanh, lambda x: x),
    "decay_scan": (lambda x: -x.abs(), lambda x: x),
    "log_scan": (lambda x: -x.abs(), lambda x: x),
    "min_gru": (lambda x: x,) * 2,
    "min_lstm": (lambda x: x,) * 3,
    "min_gru_joint": (lambda x: torch.cat([x, x.flip(-1)], -1),),
    "min_lstm_joint": (lambda x: torch.cat([x, x.flip(-1), -x], -1),),
}
# (B, T, D): nothing, a step, whole vectors and not, and tiles of time in parallel.
SHAPES = [(2, 0, 3), (1, 1, 1), (2, 37, 33), (3, 64, 16), (1, 700, 20), (2, 300, 130)]


def scan_calls(name: str, dtype: torch.dtype) -> list[tuple[Any, list[Any]]]:
    calls: list[tuple[Any, list[Any]]] = []
    carry = torch.float64 if dtype == torch.float64 else torch.float32
    flags = [[]] if name.endswith("_scan") else [[False], [True]]
    for number, (rows, time, channels) in enumerate(SHAPES):
        draws = [f(torch.randn(rows, time, channels)) for f in DRAWN[name]]
        inputs = [x.to(dtype) for x in draws]
        if number == 2:  # time is adjacent
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        lasts, cu_seqlens, resets = rows, None, None
        if rows == 1 and time > 1:
            cu_seqlens = torch.tensor([3, 3, time // 2, time - 5], dtype=torch.int32)
            lasts = 3
        if number == 3:
            resets = torch.rand(rows, time) < 0.1
        h0 = torch.rand(lasts, channels, dtype=carry) if number % 2 else None
        for flag in flags:
            for reverse in (False, True):
                calls.append((getattr(OPS, name).default, [*inputs, h0, cu_seqlens, resets,
                                                           reverse, *flag]))  # fmt: skip
    return calls


def backward_call(op: Any, args: Sequence[Any], h: Tensor, last: Tensor) -> tuple[Any, list[Any]]:
    """The backward pass of a call that returned these."""
    name = op._schema.name.split("::")[1]
    backward = getattr(OPS, f"{name}_backward").default
    inputs = DRAWN[name]
    saved = args[:1] if name in ("linear_scan", "decay_scan") else args[: len(inputs)]
    gradients = torch.randn_like(h), torch.randn_like(last)
    return backward, [*gradients, *saved, h, *args[len(inputs) :]]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", DRAWN)
def test_scans(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    calls = scan_calls(name, dtype)
    forward = on_arm(tmp_path, calls)
    later = []
    for (op, args), found in zip(calls, forward, strict=True):
        h, last = op(*wide(args))
        check(found[0], h)
        check(found[1], last)
        later.append(backward_call(op, args, found[0], found[1]))
    for (op, args), found in zip(later, on_arm(tmp_path, later), strict=True):
        for gradient, exact in zip(found, op(*wide(args)), strict=False):
            # In 16 bits the states that backward reads are rounded: those of float64 here, too.
            check(gradient, exact, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_to_even(dtype: torch.dtype, tmp_path: Path) -> None:
    half = torch.finfo(dtype).eps / 2  # of a unit in the last place of 1
    b = torch.tensor([1.0, half, 2 * half, 2 * half, half, 2 * half]).to(dtype)
    b = b[None, :, None].expand(1, -1, 9).contiguous()
    call = (OPS.linear_scan.default, [torch.ones_like(b), b, None, None, None, False])
    h = on_arm(tmp_path, [call])[0][0]
    assert torch.equal(h, b.double().cumsum(1).to(dtype))


@pytest.mark.parametrize("name", ["log_scan", "min_gru", "min_lstm"])
def test_numbers_far_out(name: str, tmp_path: Path) -> None:
    """Among ordinary numbers: log 0, saturated gates, denormals, and what has no answer."""
    inputs = [f(torch.randn(1, 12, 19)) for f in DRAWN[name]]
    far = [-torch.inf, -1e30, -1e4, -88.5, -1e-40, 0.0, 1e-40]
    far += [] if name == "log_scan" else [1e4, 80.0]
    for x in inputs:
        places = torch.randint(x.numel(), (3, len(far)))
        for place in places:
            x.view(-1)[place] = torch.tensor(far)
    for x in inputs[1:]:
        x[0, 5, 3] = torch.nan
    flags = [] if name == "log_scan" else [False]
    op = getattr(OPS, name).default
    args = [*inputs, None, None, None, False, *flags]
    h, last = op(*wide(args))
    found = on_arm(tmp_path, [(op, args)])[0]
    for x, exact in zip(found, (h, last), strict=False):
        least = 3e-7 if name == "log_scan" else 1e-37
        torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=least, equal_nan=True)


POLICIES = {
    "tova": ms.Policy.tova(20),
    "tova_head": ms.Policy.tova(20, scope="head", sinks=2),
    "h2o": ms.Policy.h2o(20),
    "window": ms.Policy.window_sinks(20, 3),
    "large": ms.Policy.tova(1100),
}
HEADS = [(4, 2, 24), (3, 3, 64), (8, 1, 8)]


def filled(policy: ms.Policy, heads: tuple[int, int, int], dtype: torch.dtype) -> ms.MultiState:
    """A state of two rows that has seen more tokens than it keeps."""
    _, kv_heads, head_dim = heads
    state = ms.MultiState(policy, batch=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    time = min(policy.slots + 10, 60)
    q = torch.randn(2, heads[0], time, head_dim, dtype=dtype)
    k, v = torch.randn(2, 2, kv_heads, time, head_dim, dtype=dtype)
    ms.attend_prompt(q, k, v, state)
    return state


def copied(state: ms.MultiState) -> list[Tensor]:
    return [x.clone() for x in state.tensors()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_steps(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy, calls, exact = POLICIES[name], [], []
    for heads in HEADS:
        state = filled(policy, heads, dtype)
        q = torch.randn(2, heads[0], heads[2]).to(dtype)
        k, v = torch.randn(2, 2, heads[1], heads[2]).to(dtype)
        scale = heads[2] ** -0.5
        calls.append((OPS.attend_evict.default, [q, k, v, None, *copied(state), *policy.numbers,
                                                 scale]))  # fmt: skip
        theirs = restore(wide(copied(state)), policy)
        theirs.score = theirs.score.float()
        out = reference.attend_evict(*wide([q, k, v]), None, theirs, scale)
        exact.append((out, theirs))
    for found, (out, theirs) in zip(on_arm(tmp_path, calls), exact, strict=True):
        torch.testing.assert_close(
            found[0].double(), out, atol=3 * EXACT[dtype], rtol=3 * EXACT[dtype]
        )
        keys, _, position, score, free, seen, last_evicted = found[4:]
        marks = (position, free, seen, last_evicted)
        expected = (theirs.position, theirs.free, theirs.seen, theirs.last_evicted)
        for x, y in zip(marks, expected, strict=True):
            assert torch.equal(x, y)
        torch.testing.assert_close(score, theirs.score, atol=1e-6, rtol=2e-5)
        kept = (theirs.position >= 0).expand(-1, keys.shape[1], -1)
        assert torch.equal(keys.double()[kept], theirs.keys[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_sequences(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy, calls = POLICIES[name], []
    for heads in HEADS:
        q = torch.randn(2, heads[0], 50, heads[2]).to(dtype)
        k, v = torch.randn(2, 2, heads[1], 50, heads[2]).to(dtype)
        valid = torch.rand(2, 50) < 0.9
        settings = (policy.slots, policy.scope == "head", *policy.numbers, heads[2] ** -0.5)
        calls.append((OPS.attend_sequence.default, [q, k, v, valid, *settings]))
    found, later = on_arm(tmp_path, calls), []
    for (_, args), (out, expiry, *_) in zip(calls, found, strict=True):
        q, k, v, valid, *_, scale = args
        exact, kept = reference.attend_sequence(*wide([q, k, v]), policy, valid, scale)
        assert torch.equal(expiry, kept)
        torch.testing.assert_close(
            out.double(), exact, atol=3 * EXACT[dtype], rtol=3 * EXACT[dtype]
        )
        later.append((OPS.attend_sequence_backward.default,
                      [torch.randn_like(q), q, k, v, expiry, valid, scale]))  # fmt: skip
    for (_, args), gradients in zip(later, on_arm(tmp_path, later), strict=True):
        grad, q, k, v, expiry, valid, scale = args
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        exact, again = reference.attend_sequence(*leaves, policy, valid, scale)
        assert torch.equal(again, expiry)
        for x, y in zip(gradients, torch.autograd.grad(exact, leaves, grad.double()), strict=False):
            assert norm_error(x, y) < 3 * EXACT[dtype]


def test_what_is_refused(tmp_path: Path) -> None:
    x = torch.randn(1, 4, 3)
    wrong = (OPS.min_gru.default, [x, x[:, :2], None, None, None, False, False])
    (words,) = run(tmp_path, [wrong], 1)
    assert words == "expected tensors of one shape"
