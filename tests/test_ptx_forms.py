"""Every form of instruction that the machine for PTX knows, with values from the text of its ISA.

"Parallel Thread Execution ISA" is NVIDIA's name for that text. Expected values are worked out from
it by hand, or by Python's integers and numpy; the machine has no part in them. Where the text
leaves a result open, a case says ANY: the machine must go on, and that is all.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ptx_kernels
import pytest
from emulation.ptx import machine
from processes import output_of

pytestmark = pytest.mark.skipif(not ptx_kernels.AVAILABLE, reason="needs a C++ compiler")

INF, NAN, ANY = float("inf"), float("nan"), object()
S16, S32, S64 = 2**15, 2**31, 2**63
U32, U64 = 2**32 - 1, 2**64 - 1
FLT_MAX, FLT_MIN, FLT_TINY = float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-149
DBL_MAX, DBL_MIN, DBL_TINY = float.fromhex("0x1.fffffffffffffp1023"), 2.0**-1022, 2.0**-1074

# A value in a slot of eight bytes, by type. Narrow floats are bits, but for NaN.
FLOATS = {"f32": ("<f", "<I"), "f64": ("<d", "<Q")}
NAN_BITS = {"f16": (0x7C00, 0x3FF), "bf16": (0x7F80, 0x7F)}


def bits_of(kind: str) -> int:
    return 32 if kind in ("pred", "f16x2") else int(kind.lstrip("bfsu"))


def slot(kind: str, value: Any) -> bytes:
    if kind in FLOATS and isinstance(value, float):
        return struct.pack(FLOATS[kind][0], value).ljust(8, b"\0")
    return struct.pack("<Q", value & U64)


def same(kind: str, got: bytes, expected: Any, ulps: int) -> bool:
    if expected is ANY:
        return True
    found = int.from_bytes(got, "little") & (2 ** bits_of(kind) - 1)
    if kind in FLOATS and isinstance(expected, float):
        floating, integer = FLOATS[kind]
        value = struct.unpack(floating, found.to_bytes(bits_of(kind) // 8, "little"))[0]
        if np.isnan(expected):
            return bool(np.isnan(value))
        wanted = struct.unpack(integer, struct.pack(floating, expected))[0]
        special = expected == 0 or np.isinf(expected)
        return abs(found - wanted) <= (0 if special else ulps)
    if kind in NAN_BITS and isinstance(expected, float):
        exponent, fraction = NAN_BITS[kind]
        return found & exponent == exponent and found & fraction != 0
    return found == expected & (2 ** bits_of(kind) - 1)


# Instructions whose operands are numbers: a row is a form, the types of what it reads and writes,
# and cases, each what it reads followed by what it writes. Each thread of a block executes a case.


@dataclass(frozen=True)
class Row:
    form: str
    kinds: str  # of operands, as forms.h has them
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    cases: tuple[tuple[Any, ...], ...]
    literal: str = ""  # that stands last among the operands
    ulps: int = 0  # units in the last place that the ISA allows
    guarded: bool = False  # what a case reads first is whether its thread executes the instruction

    def __str__(self) -> str:
        return f"{self.form} {self.kinds} {self.literal}".strip()

    def text(self, name: str) -> str:
        registers = []
        load, store = [], []
        for i, kind in enumerate(self.reads):
            at = f"[%in+{8 * i}]"
            if kind == "pred":
                load.append(f"ld.global.b32 %r40, {at}; setp.ne.b32 %p{i}, %r40, 0;")
                registers.append(f"%p{i}")
            else:
                letter, size = _register(kind)
                load.append(f"ld.global.b{size} %{letter}{i}, {at};")
                registers.append(f"%{letter}{i}")
        for i, kind in enumerate(self.writes):
            at = f"[%out+{8 * i}]"
            if kind == "pred":
                store.append(f"selp.b32 %r40, 1, 0, %p{4 + i}; st.global.b32 {at}, %r40;")
                registers.insert(i, f"%p{4 + i}")
            else:
                letter, size = _register(kind)
                store.append(f"st.global.b{size} {at}, %{letter}{12 + i};")
                registers.insert(i, f"%{letter}{12 + i}")
        guard = ""
        if self.guarded:
            guard = f"@{registers.pop(len(self.writes))} "
        body = f"""
  mad.wide.u32 %in, %thread, {8 * len(self.reads)}, %in;
  mad.wide.u32 %out, %thread, {8 * len(self.writes)}, %out;
  {" ".join(load)}
  {guard}{self.form} {self._operands(registers)};
  {" ".join(store)}"""
        return ptx_kernels.entry(name, body)

    def _operands(self, registers: list[str]) -> str:
        left, made = list(registers), []
        for kind, count in _kinds(self.kinds):
            if count:
                made.append("{" + ", ".join(left.pop(0) for _ in range(count)) + "}")
            elif kind == "p":
                second = self.writes[1:2] == ("pred",)
                made.append(left.pop(0) + ("|" + left.pop(0) if second else ""))
            else:
                made.append(self.literal if kind == "i" else left.pop(0))
        assert not left
        return ", ".join(made)


def _register(kind: str) -> tuple[str, int]:
    """Its letter, and the bits that are loaded: eight lie in a register of 16, among others."""
    size = max(bits_of(kind), 16)
    return {16: "h", 32: "r", 64: "d"}[size], size


def _kinds(kinds: str) -> list[tuple[str, int]]:
    return [
        (kind, int(after) if after.isdigit() else 0)
        for kind, after in zip(kinds, kinds[1:] + " ", strict=True)
        if not kind.isdigit()
    ]


ROWS: list[Row] = []


def row(form: str, types: str, *cases: tuple[Any, ...], kinds: str = "", **more: Any) -> None:
    """Types are "u16 u16 -> u32"; kinds default to one register for each."""
    reads, writes = (tuple(part.split()) for part in types.split("->"))
    assert all(len(case) == len(reads) + len(writes) for case in cases), form
    kinds = kinds or "d" * len(writes) + "s" * (len(reads) - more.get("guarded", False))
    ROWS.append(Row(form, kinds, reads, writes, cases, **more))


# fmt: off
# Integers wrap around.
row("add.s32", "s32 s32 -> s32", (1, 2, 3), (S32 - 1, 1, -S32), (-S32, -1, S32 - 1))
row("add.s64", "s64 s64 -> s64", (U32, 1, 2**32), (S64 - 1, 1, -S64), (-S64, -1, S64 - 1))
row("sub.s32", "s32 s32 -> s32", (1, 2, -1), (-S32, 1, S32 - 1), (0, -S32, -S32))
row("sub.s64", "s64 s64 -> s64", (0, 1, -1), (-S64, 1, S64 - 1), (0, -S64, -S64))
row("neg.s32", "s32 -> s32", (5, -5), (-S32, -S32), (0, 0))
row("neg.s64", "s64 -> s64", (5, -5), (-S64, -S64), (2**32, -(2**32)))
row(
    "mul.lo.s32", "s32 s32 -> s32", (-3, 5, -15), (65536, 65536, 0), (-1, -S32, -S32),
    (0x12345678, 0x9ABCDEF0, 0x12345678 * 0x9ABCDEF0),
)
row(
    "mul.lo.s64", "s64 s64 -> s64", (-3, 5, -15), (2**32, 2**32, 0), (-1, -S64, -S64),
    (0x123456789ABCDEF0, 0xFEDCBA9876543210, 0x123456789ABCDEF0 * 0xFEDCBA9876543210),
)
row("mul.hi.s32", "s32 s32 -> s32", (-1, 1, -1), (-S32, -S32, 2**30), (-S32, -1, 0), (-S32, 2, -1))
row("mul.hi.u32", "u32 u32 -> u32", (U32, U32, U32 - 1), (S32, 2, 1), (S32, 1, 0))
row("mul.wide.u16", "u16 u16 -> u32", (0xFFFF, 0xFFFF, 0xFFFE0001), (0x8000, 2, 0x10000))
row(
    "mul.wide.s16", "s16 s16 -> s32", (-S16, -S16, 2**30), (-1, 1, -1),
    (-S16, S16 - 1, -0x3FFF8000),
)
row("mul.wide.u32", "u32 u32 -> u64", (U32, U32, U32 * U32), (S32, 2, 2**32))
row("mul.wide.s32", "s32 s32 -> s64", (-S32, -S32, 2**62), (-1, 1, -1), (S32 - 1, -2, -(2**32) + 2))
row("mad.lo.s32", "s32 s32 s32 -> s32", (3, -4, 5, -7), (S32 - 1, 2, 2, 0), (65536, 65536, 7, 7))
row("mad.lo.s64", "s64 s64 s64 -> s64", (3, -4, 5, -7), (S64 - 1, 2, 2, 0), (2**32, 2**32, 7, 7))
row(
    "mad.wide.u32", "u32 u32 u64 -> u64", (S32, 4, 5, 2**33 + 5),
    (U32, U32, U64, 2**64 - 2**33),  # (2^64 - 2^33 + 1) + (2^64 - 1), modulo 2^64
)
row(
    "mad.wide.s32", "s32 s32 s64 -> s64", (-1, 1, 0, -1), (-S32, -S32, -1, 2**62 - 1),
    (-1, 8, 100, 92),
)
# The quotient by zero is unspecified, and the text is silent on -2^31 / -1.
for width, edge in (("32", S32), ("64", S64)):
    signed, unsigned = f"s{width}", f"u{width}"
    row(
        f"div.{signed}", f"{signed} {signed} -> {signed}", (7, 2, 3), (-7, 2, -3), (7, -2, -3),
        (-7, -2, 3), (edge - 1, -1, 1 - edge), (-edge, 1, -edge), (5, 0, ANY), (-edge, -1, ANY),
    )
    row(
        f"div.{unsigned}", f"{unsigned} {unsigned} -> {unsigned}", (7, 2, 3),
        (2 * edge - 1, 2, edge - 1), (edge, 2 * edge - 1, 0), (5, 0, ANY),
    )
    # The text leaves the sign of a remainder to the machine; that of CUDA C++ is the dividend's.
    row(
        f"rem.{signed}", f"{signed} {signed} -> {signed}", (7, 2, 1), (-7, 2, -1), (7, -2, 1),
        (-edge, 3, -2), (5, 0, ANY), (-edge, -1, ANY),
    )
    row(
        f"rem.{unsigned}", f"{unsigned} {unsigned} -> {unsigned}", (7, 2, 1), (2 * edge - 1, 10, 5),
        (edge, 2 * edge - 1, edge), (5, 0, ANY),
    )
    row(
        f"min.{signed}", f"{signed} {signed} -> {signed}", (-edge, edge - 1, -edge), (1, -1, -1),
        (2, 3, 2),
    )
    row(
        f"max.{signed}", f"{signed} {signed} -> {signed}", (-edge, edge - 1, edge - 1), (1, -1, 1),
        (2, 3, 3),
    )
    row(
        f"min.{unsigned}", f"{unsigned} {unsigned} -> {unsigned}", (edge, 1, 1),
        (0, 2 * edge - 1, 0),
    )
    row(f"max.{unsigned}", f"{unsigned} {unsigned} -> {unsigned}", (edge, 1, edge), (0, 5, 5))
row(
    "div.u16", "u16 u16 -> u16", (7, 2, 3), (65535, 65535, 1), (65535, 1, 65535), (32768, 65535, 0),
    (1, 0, ANY),
)

# Floating-point numbers are rounded to the nearest, of two to the even one, unless .rz says
# otherwise. Without .ftz subnormal numbers are kept. What a NaN holds is unspecified.
TWO = "f32 f32 -> f32"
u = 2.0**-23
for form in ("add.f32", "add.rn.f32"):
    row(
        form, TWO, (1.0, 2.0**-24, 1.0), (1 + u, 2.0**-24, 1 + 2 * u),
        (1.0, 2.0**-24 + 2.0**-47, 1 + u), (FLT_TINY, FLT_TINY, 2.0**-148), (FLT_MAX, FLT_MAX, INF),
        (FLT_MAX, 2.0**102, FLT_MAX), (1.0, -1.0, 0.0), (-0.0, -0.0, -0.0), (-0.0, 0.0, 0.0),
        (INF, -INF, NAN), (NAN, 1.0, NAN),
    )
for form in ("sub.f32", "sub.rn.f32"):
    row(
        form, TWO, (1.0, 2.0**-25, 1.0), (1.0, 3 * 2.0**-25, 1 - 2.0**-23),
        (FLT_MIN, FLT_TINY, FLT_MIN - FLT_TINY), (0.0, 0.0, 0.0), (-0.0, 0.0, -0.0),
        (INF, INF, NAN), (-FLT_MAX, FLT_MAX, -INF),
    )
for form in ("mul.f32", "mul.rn.f32"):
    row(
        form, TWO, (1 + u, 1 + u, 1 + 2 * u),
        (1 + 2.0**-12, 1 + 2.0**-12, 1 + 2.0**-11),  # a tie
        (2.0**-100, 2.0**-49, FLT_TINY), (2.0**-100, 2.0**-50, 0.0), (2.0**-100, -(2.0**-50), -0.0),
        (2.0**100, 2.0**28, INF), (0.0, INF, NAN), (-0.0, 5.0, -0.0),
    )
# Pairs of floats in 64 bits, the first in the low half; each half is rounded on its own.
def pair(low: float, high: float) -> int:
    return int.from_bytes(struct.pack("<ff", low, high), "little")


for rounding in ("", "rn."):
    row(
        f"add.{rounding}f32x2", "b64 b64 -> b64",
        (pair(1.0, 1 + u), pair(2.0**-24, 2.0**-24), pair(1.0, 1 + 2 * u)),
        (pair(FLT_TINY, -0.0), pair(FLT_TINY, -0.0), pair(2.0**-148, -0.0)),
    )
    row(
        f"sub.{rounding}f32x2", "b64 b64 -> b64",
        (pair(1.0, 5.0), pair(2.0**-25, 7.0), pair(1.0, -2.0)),
        (pair(0.0, -FLT_MAX), pair(0.0, FLT_MAX), pair(0.0, -INF)),
    )
    row(
        f"mul.{rounding}f32x2", "b64 b64 -> b64",
        (pair(1 + u, 2.0**-100), pair(1 + u, -(2.0**-50)), pair(1 + 2 * u, -0.0)),
    )
row(
    "fma.rn.f32x2", "b64 b64 b64 -> b64",
    (
        pair(1 + 2.0**-12, 3.0), pair(1 + 2.0**-12, -2.0), pair(-1 - 2.0**-11, 1.0),
        pair(2.0**-24, -5.0),
    ),
)
# A bfloat16, widened first, and a float.
row(
    "add.rn.f32.bf16", "b16 f32 -> f32", (0x3F80, 2.0**-24, 1.0),
    (0x3F80, 2.0**-24 + 2.0**-47, 1 + u), (0xC040, 1.5, -1.5), (0xFF80, INF, NAN),
    (0x0001, 0.0, 2.0**-133),
)
row(
    "add.rz.f32", TWO, (1.0, 2.0**-24, 1.0), (1 + u, 2.0**-24, 1 + u),
    (-1 - u, -(2.0**-24), -1 - u), (1.0, u - 2.0**-47, 1.0), (1.0, 2.0**-100, 1.0),
    (1.0, FLT_TINY, 1.0), (-1.0, -FLT_TINY, -1.0),
    # Far below the last bit, and with the other sign: the next number towards zero.
    (1.0, -(2.0**-100), 1 - 2.0**-24), (-FLT_TINY, 1.0, 1 - 2.0**-24),
    (-1.0, FLT_TINY, -1 + 2.0**-24), (1.5, -(2.0**-60), 1.5 - u), (FLT_MAX, FLT_MAX, FLT_MAX),
    (-FLT_MAX, -FLT_MAX, -FLT_MAX), (1.0, -1.0, 0.0), (-0.0, -0.0, -0.0), (-0.0, 0.0, 0.0),
    (FLT_TINY, FLT_TINY, 2.0**-148), (INF, 1.0, INF), (-INF, FLT_MAX, -INF), (INF, -INF, NAN),
    (NAN, 1.0, NAN),
)
TWO64 = "f64 f64 -> f64"
v = 2.0**-52
for form in ("add.f64", "add.rn.f64"):
    row(
        form, TWO64, (1.0, 2.0**-53, 1.0), (1 + v, 2.0**-53, 1 + 2 * v),
        (DBL_TINY, DBL_TINY, 2.0**-1073), (DBL_MAX, DBL_MAX, INF), (1.0, -1.0, 0.0),
        (-0.0, -0.0, -0.0), (INF, -INF, NAN),
    )
for form in ("sub.f64", "sub.rn.f64"):
    row(
        form, TWO64, (1.0, 2.0**-54, 1.0), (DBL_MIN, DBL_TINY, DBL_MIN - DBL_TINY),
        (-0.0, 0.0, -0.0), (INF, INF, NAN),
    )
for form in ("mul.f64", "mul.rn.f64"):
    row(
        form, TWO64, (1 + v, 1 + v, 1 + 2 * v),
        (1 + 2.0**-27, 1 + 2.0**-26, 1 + 2.0**-26 + 2.0**-27), (0.0, INF, NAN),
        (2.0**-1000, 2.0**-74, DBL_TINY), (2.0**-1000, 2.0**-75, 0.0), (-0.0, 5.0, -0.0),
    )
# One rounding: the product is exact, and so is what a double would lose.
row(
    "fma.rn.f32", "f32 f32 f32 -> f32", (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24),
    (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-100, 1 + 2.0**-11 + u),
    (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-100), 1 + 2.0**-11), (0.0, INF, 1.0, NAN),
    (INF, 1.0, -INF, NAN), (1.0, 1.0, -1.0, 0.0), (-0.0, 1.0, -0.0, -0.0), (0.0, 1.0, -0.0, 0.0),
    (2.0**-75, 2.0**-74, 0.0, FLT_TINY), (FLT_MAX, 2.0, -FLT_MAX, FLT_MAX),
)
# Zeros in place of subnormal numbers, before and after.
row(
    "fma.rn.ftz.f32", "f32 f32 f32 -> f32",
    (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24), (2.0**-127, 2.0**100, 1.0, 1.0),
    (1.0, 1.0, 2.0**-127, 1.0), (2.0**-100, 2.0**-30, 0.0, 0.0),
    (2.0**-100, -(2.0**-30), 0.0, -0.0), (1.0, -(2.0**-130), -0.0, -0.0),
    (FLT_MIN, 1.0, 0.0, FLT_MIN), (0.0, INF, 1.0, NAN),
)
row(
    "fma.rn.f64", "f64 f64 f64 -> f64", (1 + 2.0**-27, 1 + 2.0**-27, -1 - 2.0**-26, 2.0**-54),
    (DBL_MAX, 2.0, -DBL_MAX, DBL_MAX), (0.0, INF, 1.0, NAN), (1.0, 1.0, -1.0, 0.0),
    (-0.0, 1.0, -0.0, -0.0),
)
row(
    "div.rn.f32", TWO, (1.0, 3.0, float.fromhex("0x1.555556p-2")),
    (2.0, 3.0, float.fromhex("0x1.555556p-1")), (FLT_TINY, 2.0, 0.0),
    (3 * FLT_TINY, 2.0, 2 * FLT_TINY), (FLT_MAX, 0.5, INF), (1.0, 0.0, INF), (-1.0, 0.0, -INF),
    (1.0, -0.0, -INF), (0.0, 0.0, NAN), (INF, INF, NAN), (1.0, -INF, -0.0),
)
row(
    "div.rn.f64", TWO64, (1.0, 3.0, float.fromhex("0x1.5555555555555p-2")), (DBL_TINY, 2.0, 0.0),
    (1.0, -0.0, -INF), (0.0, 0.0, NAN), (1.0, -INF, -0.0),
)
# .full: within 2 ulp over the whole range.
row(
    "div.full.f32", TWO, (6.0, 3.0, 2.0), (1.0, 3.0, float.fromhex("0x1.555556p-2")),
    (-(2.0**100), 2.0**-20, -(2.0**120)), (1.0, 0.0, INF), (-1.0, 0.0, -INF), (0.0, 0.0, NAN),
    (NAN, 1.0, NAN), ulps=2,
)
row(
    "neg.f32", "f32 -> f32", (1.5, -1.5), (0.0, -0.0), (-0.0, 0.0), (INF, -INF),
    (FLT_TINY, -FLT_TINY), (NAN, NAN),
)
row(
    "neg.f64", "f64 -> f64", (1.5, -1.5), (0.0, -0.0), (-0.0, 0.0), (-INF, INF),
    (DBL_TINY, -DBL_TINY), (NAN, NAN),
)
row(
    "abs.f32", "f32 -> f32", (-1.5, 1.5), (-0.0, 0.0), (-INF, INF), (-FLT_TINY, FLT_TINY),
    (NAN, NAN),
)
row(
    "abs.f64", "f64 -> f64", (-1.5, 1.5), (-0.0, 0.0), (-INF, INF), (-DBL_TINY, DBL_TINY),
    (NAN, NAN),
)
row("abs.ftz.f32", "f32 -> f32", (-1.5, 1.5), (-FLT_TINY, 0.0), (FLT_TINY, 0.0), (-INF, INF))
row("abs.f16", "b16 -> b16", (0xBC00, 0x3C00), (0x8001, 1), (0xFC00, 0x7C00), (0x3C00, 0x3C00))
row("abs.bf16", "b16 -> b16", (0xBF80, 0x3F80), (0x8001, 1), (0xFF80, 0x7F80), (0x3F80, 0x3F80))
row("abs.f16x2", "b32 -> b32", (0xBC00C000, 0x3C004000), (0x80008001, 1), (0xFC003C00, 0x7C003C00))
row("abs.bf16x2", "b32 -> b32", (0xBF80C000, 0x3F804000), (0x80008001, 1), (0xFF803F80, 0x7F803F80))
# The sign of the first, the rest of the second.
for kind in ("f32", "f64"):
    row(
        f"copysign.{kind}", f"{kind} {kind} -> {kind}", (-2.0, 3.0, -3.0), (2.0, -3.0, 3.0),
        (-0.0, 5.0, -5.0), (-INF, 0.0, -0.0), (0.0, -INF, INF),
    )
    # A number beats NaN, and +0 is larger than -0.
    tiny = FLT_TINY if kind == "f32" else DBL_TINY
    row(
        f"min.{kind}", f"{kind} {kind} -> {kind}", (1.0, 2.0, 1.0), (2.0, 1.0, 1.0),
        (NAN, 1.0, 1.0), (1.0, NAN, 1.0), (NAN, INF, INF), (NAN, NAN, NAN), (-0.0, 0.0, -0.0),
        (0.0, -0.0, -0.0), (2 * tiny, tiny, tiny), (-INF, 1.0, -INF),
    )
    row(
        f"max.{kind}", f"{kind} {kind} -> {kind}", (1.0, 2.0, 2.0), (2.0, 1.0, 2.0),
        (NAN, 1.0, 1.0), (1.0, NAN, 1.0), (-INF, NAN, -INF), (NAN, NAN, NAN), (-0.0, 0.0, 0.0),
        (0.0, -0.0, 0.0), (2 * tiny, tiny, 2 * tiny), (-INF, 1.0, 1.0),
    )
# Of three.
row(
    "max.f32", "f32 f32 f32 -> f32", (1.0, 2.0, 3.0, 3.0), (3.0, 2.0, 1.0, 3.0),
    (1.0, 3.0, 2.0, 3.0), (NAN, 1.0, 2.0, 2.0), (1.0, NAN, 0.5, 1.0),
    (NAN, NAN, 1.0, 1.0), (1.0, -1.0, NAN, 1.0),
    (NAN, NAN, NAN, NAN), (-0.0, -0.0, 0.0, 0.0), (-INF, -1.0, -FLT_TINY, -FLT_TINY),
)
for name, low, high, zero in (("min", 1.0, -INF, -0.0), ("max", 2.0, 1.0, 0.0)):
    row(
        f"{name}.NaN.f32", TWO, (1.0, 2.0, low), (-INF, 1.0, high), (-0.0, 0.0, zero),
        (0.0, -0.0, zero), (NAN, 1.0, NAN), (1.0, NAN, NAN), (NAN, NAN, NAN),
    )
# Approximate: the tables of special values hold exactly. .ftz takes subnormal numbers for zeros of
# their sign, and returns none.
row(
    "ex2.approx.ftz.f32", "f32 -> f32", (0.0, 1.0), (-0.0, 1.0), (2.0**-130, 1.0),
    (-(2.0**-130), 1.0), (-INF, 0.0), (INF, INF), (NAN, NAN), (1.0, 2.0), (-126.0, FLT_MIN),
    (-127.0, 0.0), (128.0, INF),
    *[(x, float(np.float32(2.0 ** float(np.float32(x))))) for x in (0.5, -10.3, 100.7, 1e-3)],
    ulps=2,
)
row(
    "lg2.approx.ftz.f32", "f32 -> f32", (1.0, 0.0), (8.0, 3.0), (0.5, -1.0), (0.0, -INF),
    (-0.0, -INF), (2.0**-130, -INF), (-(2.0**-130), -INF), (-1.0, NAN), (-INF, NAN), (INF, INF),
    (NAN, NAN), (FLT_MIN, -126.0),
    *[(x, float(np.float32(np.log2(float(np.float32(x)))))) for x in (3.0, 1e-20, 12345.678)],
    ulps=4,
)
row(
    "rcp.approx.ftz.f32", "f32 -> f32", (2.0, 0.5), (3.0, float.fromhex("0x1.555556p-2")),
    (0.0, INF), (-0.0, -INF), (INF, 0.0), (-INF, -0.0), (2.0**-127, INF), (-(2.0**-127), -INF),
    (2.0**127, 0.0), (-(2.0**127), -0.0), (NAN, NAN), ulps=1,
)
# Only the upper half of a double takes part: about 20 bits.
row(
    "rcp.approx.ftz.f64", "f64 -> f64", (2.0, 0.5), (3.0, 1 / 3), (-1 / 3, -3.0), (0.0, INF),
    (-0.0, -INF), (INF, 0.0), (-INF, -0.0), (NAN, NAN), (2.0**-1030, INF), (-(2.0**-1030), -INF),
    (2.0**1023, 0.0), (-(2.0**1023), -0.0), ulps=2**33,
)
row(
    "rcp.rn.f32", "f32 -> f32", (3.0, float.fromhex("0x1.555556p-2")), (0.0, INF), (-0.0, -INF),
    (-INF, -0.0), (NAN, NAN), (FLT_TINY, INF), (2.0**127, 2.0**-127),
)
row(
    "rcp.rn.f64", "f64 -> f64", (3.0, 1 / 3), (-0.0, -INF), (DBL_TINY, INF),
    (2.0**1023, 2.0**-1023),
)
row(
    "sqrt.rn.f32", "f32 -> f32", (4.0, 2.0), (2.0, float.fromhex("0x1.6a09e6p0")), (-0.0, -0.0),
    (-1.0, NAN), (INF, INF), (2.0**-148, 2.0**-74), (3.0, float(np.sqrt(np.float32(3)))),
)
row(
    "sqrt.rn.f64", "f64 -> f64", (2.0, float.fromhex("0x1.6a09e667f3bcdp0")), (-0.0, -0.0),
    (-1.0, NAN), (DBL_TINY, 2.0**-537),
)

# Comparisons: whether they hold of a < b, a = b, a > b, and of a NaN. q is the opposite of p.
HOLDS = {
    "eq": (0, 1, 0, 0),
    "ne": (1, 0, 1, 0),
    "lt": (1, 0, 0, 0),
    "le": (1, 1, 0, 0),
    "gt": (0, 0, 1, 0),
    "ge": (0, 1, 1, 0),
    "equ": (0, 1, 0, 1),
    "neu": (1, 0, 1, 1),
    "ltu": (1, 0, 0, 1),
    "leu": (1, 1, 0, 1),
    "gtu": (0, 0, 1, 1),
    "geu": (0, 1, 1, 1),
    "num": (1, 1, 1, 0),
    "nan": (0, 0, 0, 1),
}
# Pairs of a smaller and a larger number, pairs of equal ones, and NaNs with a number.
PAIRS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "s16": ([(-1, 0), (-S16, S16 - 1)], [(-S16, -S16)], []),
    "s32": ([(-1, 0), (-S32, S32 - 1)], [(-S32, -S32)], []),
    "s64": ([(-1, 0), (-S64, S64 - 1), (1, 2**32)], [(-S64, -S64)], []),
    "u16": ([(0, 0xFFFF), (S16 - 1, S16)], [(0xFFFF, 0xFFFF)], []),
    "u32": ([(0, U32), (S32 - 1, S32)], [(U32, U32)], []),
    "u64": ([(0, U64), (S64 - 1, S64), (1, 2**32)], [(U64, U64)], []),
    "b16": ([(0, 0xFFFF)], [(0xFFFF, 0xFFFF)], []),
    "b32": ([(0, U32), (0xFFFF, 0x1FFFF)], [(U32, U32)], []),
    "b64": ([(0, U64), (1, 2**32 + 1)], [(U64, U64)], []),
    "f32": (
        [(-INF, -1.0), (-1.0, 0.5), (-FLT_TINY, 0.0), (FLT_MAX, INF)],
        [(0.0, -0.0), (INF, INF), (1.5, 1.5)],
        [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (NAN, INF)],
    ),
    "f64": (
        [(-INF, -1.0), (-1.0, 0.5), (-DBL_TINY, 0.0), (1.0, 1 + v)],
        [(0.0, -0.0), (INF, INF), (1.5, 1.5)],
        [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (NAN, INF)],
    ),
    # As bits: -inf, -1, -0, 0, the least subnormal, 1.
    "f16": (
        [(0xFC00, 0xBC00), (0xBC00, 0x3C00), (0x0000, 0x0001), (0x8001, 0x8000)],
        [(0x0000, 0x8000), (0x7C00, 0x7C00)],
        [(0x7E00, 0x3C00), (0x3C00, 0xFE00), (0x7C01, 0x7C01)],
    ),
    "bf16": (
        [(0xFF80, 0xBF80), (0xBF80, 0x3F80), (0x0000, 0x0001), (0x8001, 0x8000)],
        [(0x0000, 0x8000), (0x7F80, 0x7F80)],
        [(0x7FC0, 0x3F80), (0x3F80, 0xFFC0), (0x7F81, 0x7F81)],
    ),
}
COMPARED = {
    **dict.fromkeys(("lt", "le", "gt", "ge"), "s16 u16 s32 u32 s64 u64 f32 f64 f16 bf16"),
    **dict.fromkeys(("eq", "ne"), "b16 b32 b64 s16 u16 s32 u32 s64 u64 f32 f64 f16 bf16"),
    **dict.fromkeys(("equ", "neu", "ltu", "leu", "gtu", "geu", "num"), "f32 f64"),
    "nan": "f32 f64 f16 bf16",
}
for operator, kinds in COMPARED.items():
    smaller, equal, larger, unordered = HOLDS[operator]
    for kind in kinds.split():
        less, alike, nans = PAIRS[kind]
        cases = [(a, b, smaller, 1 - smaller) for a, b in less]
        cases += [(b, a, larger, 1 - larger) for a, b in less]
        cases += [(a, b, equal, 1 - equal) for a, b in alike]
        cases += [(a, b, unordered, 1 - unordered) for a, b in nans]
        types = f"{kind} {kind} -> pred pred"
        if kind in NAN_BITS:  # have no q
            cases, types = [case[:3] for case in cases], f"{kind} {kind} -> pred"
        row(f"setp.{operator}.{kind}", types, *cases, kinds="pss")
row("setp.lt.s32", "s32 s32 -> pred", (1, 2, 1), (2, 1, 0), kinds="pss")  # p alone
# Of pairs: p for the low numbers, q for the high ones.
for kind in ("f16", "bf16"):
    less, alike, nans = PAIRS[kind]
    for operator in ("lt", "le", "gt", "ge", "eq", "ne", "nan"):
        smaller, equal, larger, unordered = HOLDS[operator]
        each = [(a, b, smaller) for a, b in less] + [(b, a, larger) for a, b in less]
        each += [(a, b, equal) for a, b in alike] + [(a, b, unordered) for a, b in nans]
        row(
            f"setp.{operator}.{kind}x2", "b32 b32 -> pred pred",
            *[
                (low | high << 16, other_low | other_high << 16, p, q)
                for (low, other_low, p), (high, other_high, q) in zip(
                    each, each[4:] + each[:4], strict=True
                )
            ],
            kinds="pss",
        )

# Bits.
LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
PATTERN_A, PATTERN_B = 0xF0F0A5A5123489AB, 0xFF005A3C0F0FCDEF
for name, of in LOGIC.items():
    row(f"{name}.pred", "pred pred -> pred", *[(a, b, of(a, b)) for a in (0, 1) for b in (0, 1)])
    for bits in (16, 32, 64):
        a, b = PATTERN_A & 2**bits - 1, PATTERN_B & 2**bits - 1
        row(f"{name}.b{bits}", f"b{bits} b{bits} -> b{bits}", (a, b, of(a, b)))
row("not.pred", "pred -> pred", (0, 1), (1, 0))
for bits in (16, 32, 64):
    top = 2 ** (bits - 1)
    row(f"not.b{bits}", f"b{bits} -> b{bits}", (PATTERN_A & 2**bits - 1, ~PATTERN_A))
    # Shifts by the width and by more leave zeros, or signs.
    row(
        f"shl.b{bits}", f"b{bits} u32 -> b{bits}", (top + 1, 1, 2), (1, bits - 1, top),
        (1, bits, 0), (3, bits + 1, 0), (1, U32, 0), (5, 0, 5),
    )
    row(
        f"shr.u{bits}", f"u{bits} u32 -> u{bits}", (top, bits - 1, 1), (top, bits, 0),
        (top, U32, 0), (top + 3, 1, top // 2 + 1), (top, 0, top),
    )
    row(
        f"shr.s{bits}", f"s{bits} u32 -> s{bits}", (-top, bits - 1, -1), (-top, bits, -1),
        (-top, U32, -1), (top - 1, bits, 0), (-3, 1, -2), (-top, 1, -top // 2),
    )
# 32 bits of b (high) and a (low). .wrap takes the amount modulo 32, .clamp makes it 32 at most.
LOW, HIGH = 0x89ABCDEF, 0x01234567
for direction, mode, amounts in (
    ("l", "wrap", {0: HIGH, 4: 0x12345678, 31: 0xC4D5E6F7, 32: HIGH, 36: 0x12345678}),
    ("l", "clamp", {0: HIGH, 4: 0x12345678, 31: 0xC4D5E6F7, 32: LOW, 36: LOW, U32: LOW}),
    ("r", "wrap", {0: LOW, 4: 0x789ABCDE, 31: 0x02468ACF, 32: LOW, 36: 0x789ABCDE}),
    ("r", "clamp", {0: LOW, 4: 0x789ABCDE, 31: 0x02468ACF, 32: HIGH, 36: HIGH, U32: HIGH}),
):
    row(
        f"shf.{direction}.{mode}.b32", "b32 b32 u32 -> b32",
        *[(LOW, HIGH, amount, result) for amount, result in amounts.items()],
    )
# The table of a function is what it makes of 0xF0, 0xCC and 0xAA.
LOGIC3: dict[str, Callable[[int, int, int], int]] = {
    "0xF0": lambda a, b, c: a,
    "0xCC": lambda a, b, c: b,
    "0xAA": lambda a, b, c: c,
    "0x80": lambda a, b, c: a & b & c,
    "0xBA": lambda a, b, c: a & ~b | c,
    "0x0A": lambda a, b, c: c & ~a,
    "0x96": lambda a, b, c: a ^ b ^ c,
    "0xCA": lambda a, b, c: a & b | ~a & c,
    "0x00": lambda a, b, c: 0,
    "0xFF": lambda a, b, c: -1,
}
for literal, function in LOGIC3.items():
    a, b, c = 0xF0F0A5A5, 0xFF005A3C, 0x0F1E2D4B
    row(
        "lop3.b32", "b32 b32 b32 -> b32", (a, b, c, function(a, b, c)), kinds="dsssi",
        literal=literal,
    )
# Bytes 0 to 3 are those of a, 4 to 7 those of b; a selector of 8 or more repeats the byte's sign.
row(
    "prmt.b32", "b32 b32 b32 -> b32",
    (0x33221100, 0x77665544, 0x3210, 0x33221100), (0x33221100, 0x77665544, 0x7654, 0x77665544),
    (0x33221100, 0x77665544, 0x5410, 0x55441100), (0x33221100, 0x77665544, 0x0123, 0x00112233),
    (0x33221100, 0x77665544, 0x7777, 0x77777777),
    (0x33221100, 0x77665544, 0xFFFF3210, 0x33221100),  # only four nibbles count
    (0x7F80FF01, 0x80000000, 0xBA98, 0x00FFFF00), (0x7F80FF01, 0x80000000, 0xF0F1, 0xFF01FFFF),
)
# bfi f, a, b, position, length: the low bits of a in b. Both numbers are taken modulo 256.
row(
    "bfi.b32", "b32 b32 u32 u32 -> b32", (0xABCD, 0, 8, 8, 0xCD00),
    (U32, 0x12345678, 4, 8, 0x12345FF8), (0, 0x12345678, 4, 8, 0x12345008),
    (U32, 0x12345678, 4, 0, 0x12345678), (0xFF, 0, 28, 8, 0xF0000000), (U32, 5, 32, 4, 5),
    (0xABCD1234, 5, 0, 32, 0xABCD1234), (0xABCD1234, 5, 0, 255, 0xABCD1234), (U32, 5, 255, 255, 5),
    (0xF, 0, 256, 4, 0xF), (0xF, 7, 0, 256, 7),
)
row(
    "bfi.b64", "b64 b64 u32 u32 -> b64", (0xABCD, 0, 40, 8, 0xCD0000000000),
    (0xFF, 0, 60, 8, 0xF000000000000000), (U64, 5, 64, 4, 5), (U64, 5, 30, 0, 5),
    (PATTERN_A, 5, 0, 64, PATTERN_A), (0, U64, 31, 2, U64 - (3 << 31)),
)
# bfe d, a, position, length. Signed: its last bit goes on, or that of a where a ends first.
row(
    "bfe.u32", "u32 u32 u32 -> u32", (0xABCD1234, 8, 8, 0x12), (0xABCD1234, 28, 8, 0xA),
    (U32, 32, 8, 0), (U32, 0, 0, 0), (0xABCD1234, 0, 32, 0xABCD1234), (0xABCD1234, 264, 8, 0x12),
    (U32, 4, 256, 0), (U32, 255, 255, 0),
)
row(
    "bfe.s32", "s32 u32 u32 -> s32", (0xF000, 12, 4, -1), (0x7000, 12, 4, 7),
    (0x90000000, 28, 8, -7), (-S32, 40, 4, -1), (0x40000000, 40, 4, 0), (-1, 5, 0, 0),
    (0xABCD1234, 0, 32, 0xABCD1234), (0x8000, 15, 1, -1),
)
row(
    "bfe.u64", "u64 u32 u32 -> u64", (PATTERN_A, 28, 12, 0xA51), (PATTERN_A, 60, 8, 0xF),
    (U64, 64, 8, 0), (U64, 0, 0, 0), (PATTERN_A, 0, 64, PATTERN_A),
)
row(
    "bfe.s64", "s64 u32 u32 -> s64", (0xF0 << 32, 36, 4, -1), (0x70 << 32, 36, 4, 7),
    (0x9 << 60, 60, 8, -7), (-S64, 100, 4, -1), (-1, 5, 0, 0),
)
for bits in (32, 64):
    row(
        f"popc.b{bits}", f"b{bits} -> u32", (0, 0), (-1, bits),
        (PATTERN_A & 2**bits - 1, f"{PATTERN_A & 2**bits - 1:b}".count("1")),
    )
    row(
        f"clz.b{bits}", f"b{bits} -> u32", (0, bits), (-1, 0), (1, bits - 1),
        (2 ** (bits // 2), bits // 2 - 1),
    )

# Moves.
row("mov.pred", "pred -> pred", (0, 0), (1, 1))
for kind in ("b16", "u16", "b32", "u32", "b64", "u64"):
    row(f"mov.{kind}", f"{kind} -> {kind}", (PATTERN_A, PATTERN_A), (-1, -1), (0, 0))
for kind in ("f32", "f64"):
    row(f"mov.{kind}", f"{kind} -> {kind}", (-0.0, -0.0), (INF, INF), (1.5, 1.5))
    row(
        f"mov.{kind}", f"{kind.replace('f', 'b')} -> {kind.replace('f', 'b')}",
        (0x7F800001, 0x7F800001),
    )
row("mov.b32", "b16 b16 -> b32", (0x1234, 0xABCD, 0xABCD1234), kinds="dS2")
row("mov.b32", "b32 -> b16 b16", (0xABCD1234, 0x1234, 0xABCD), kinds="D2s")
row("mov.b64", "b32 b32 -> b64", (0x12345678, 0xABCDEF01, 0xABCDEF0112345678), kinds="dS2")
row("mov.b64", "b64 -> b32 b32", (0xABCDEF0112345678, 0x12345678, 0xABCDEF01), kinds="D2s")
for kind in ("b16", "u16", "b32", "u32", "s32", "b64", "u64"):
    row(f"selp.{kind}", f"{kind} {kind} pred -> {kind}", (5, -7, 1, 5), (5, -7, 0, -7))
for kind in ("f32", "f64"):
    row(f"selp.{kind}", f"{kind} {kind} pred -> {kind}", (-0.0, 2.5, 1, -0.0), (-0.0, 2.5, 0, 2.5))

# Conversions of integers: the low bits, extended by zeros or by the sign of the narrower type. What
# lies above them in the register counts for nothing.
for form, types, integer_cases in (
    ("cvt.s16.s8", "b16 -> b16", ((0x1280, 0xFF80), (0xFF7F, 0x7F))),
    ("cvt.s32.s8", "b16 -> b32", ((0x1280, -128), (0xFF7F, 127))),
    ("cvt.s64.s8", "b16 -> b64", ((0x1280, -128), (0xFF7F, 127))),
    ("cvt.u16.u8", "b16 -> b16", ((0x1280, 128), (0xFF7F, 127))),
    ("cvt.u32.u8", "b16 -> b32", ((0x1280, 128), (0xFFFF, 255))),
    ("cvt.u64.u8", "b16 -> b64", ((0x1280, 128), (0xFFFF, 255))),
    ("cvt.u8.u16", "b16 -> b16", ((0x1280, 128), (0xFFFF, 255))),
    ("cvt.u8.u32", "b32 -> b16", ((0x12345680, 128), (U32, 255))),
    ("cvt.u8.u32", "b32 -> b32", ((0x12345680, 128), (U32, 255))),
    ("cvt.s8.s32", "b32 -> b16", ((0x12345680, 0xFF80), (0x1234567F, 127))),
    ("cvt.s8.s32", "b32 -> b32", ((0x12345680, -128), (0x1234567F, 127))),
    ("cvt.s32.s16", "b16 -> b32", ((0x8000, -S16), (0x7FFF, S16 - 1))),
    ("cvt.s32.s16", "b16 -> b64", ((0x8000, -S16), (0x7FFF, S16 - 1))),
    ("cvt.s64.s16", "b16 -> b64", ((0x8000, -S16), (0x7FFF, S16 - 1))),
    ("cvt.s32.u16", "b16 -> b32", ((0x8000, 0x8000), (0xFFFF, 0xFFFF))),
    ("cvt.u32.u16", "b16 -> b32", ((0x8000, 0x8000), (0xFFFF, 0xFFFF))),
    ("cvt.u64.u16", "b16 -> b64", ((0x8000, 0x8000), (0xFFFF, 0xFFFF))),
    ("cvt.u16.u32", "b32 -> b16", ((0x12348000, 0x8000), (U32, 0xFFFF))),
    ("cvt.u16.u32", "b32 -> b32", ((0x12348000, 0x8000), (U32, 0xFFFF))),
    ("cvt.u16.s32", "b32 -> b32", ((-1, 0xFFFF), (-S32, 0))),
    ("cvt.u16.u64", "b64 -> b32", ((0x123456789ABC8000, 0x8000), (U64, 0xFFFF))),
    ("cvt.u32.u64", "b64 -> b32", ((0x12345678FFFFFFFE, U32 - 1), (2**32, 0))),
    ("cvt.u32.u64", "b64 -> b64", ((0x12345678FFFFFFFE, U32 - 1), (2**32, 0))),
    ("cvt.s64.s32", "b32 -> b64", ((-S32, -S32), (-1, -1), (S32 - 1, S32 - 1))),
    ("cvt.s64.u32", "b32 -> b64", ((S32, S32), (U32, U32))),
    ("cvt.u64.u32", "b32 -> b64", ((S32, S32), (U32, U32))),
):
    row(form, types, *integer_cases)
# To integers they clamp. NaN is 0, or the highest bit alone where 64 bits take part.
row(
    "cvt.rzi.s32.f32", "f32 -> s32", (1.9, 1), (-1.9, -1), (-0.5, 0), (2.0**31 - 128, 2**31 - 128),
    (2.0**31, S32 - 1), (INF, S32 - 1), (-(2.0**31), -S32), (-(2.0**31) - 256, -S32), (-INF, -S32),
    (NAN, 0), (FLT_TINY, 0),
)
row(
    "cvt.rzi.u32.f32", "f32 -> u32", (1.9, 1), (-0.9, 0), (-1.0, 0), (-INF, 0),
    (3e9, 3_000_000_000), (2.0**32 - 256, 2**32 - 256), (2.0**32, U32), (INF, U32), (NAN, 0),
)
row(
    "cvt.rzi.s64.f32", "f32 -> s64", (-1.9, -1), (2.0**62, 2**62), (2.0**63, S64 - 1),
    (INF, S64 - 1), (-(2.0**63), -S64), (-INF, -S64), (NAN, S64),
)
row(
    "cvt.rn.f32.s32", "s32 -> f32", (2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4),
    (-(2**24) - 1, -(2.0**24)), (-S32, -(2.0**31)), (S32 - 1, 2.0**31), (0, 0.0),
)
row(
    "cvt.rn.f32.u32", "u32 -> f32", (2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4), (U32, 2.0**32),
    (S32, 2.0**31),
)
row(
    "cvt.rn.f32.s64", "s64 -> f32", (2**62 + 2**38, 2.0**62),
    (2**62 + 3 * 2**38, 2.0**62 + 2.0**40), (2**62 + 2**38 + 1, 2.0**62 + 2.0**39),
    (S64 - 1, 2.0**63), (-S64, -(2.0**63)),
)
row(
    "cvt.rn.f32.u64", "u64 -> f32", (2**63 + 2**39, 2.0**63),
    (2**63 + 2**39 + 1, 2.0**63 + 2.0**40), (U64, 2.0**64),
)
row("cvt.rn.f64.s32", "s32 -> f64", (-S32, -(2.0**31)), (S32 - 1, 2.0**31 - 1))
row("cvt.rn.f64.u32", "u32 -> f64", (U32, 2.0**32 - 1))
row(
    "cvt.rn.f64.s64", "s64 -> f64", (2**53 + 1, 2.0**53), (2**53 + 3, 2.0**53 + 4),
    (-(2**53) - 1, -(2.0**53)), (S64 - 1, 2.0**63), (-S64, -(2.0**63)),
)
row(
    "cvt.rn.f64.u64", "u64 -> f64", (2**63 + 2**10, 2.0**63),
    (2**63 + 3 * 2**10, 2.0**63 + 2.0**12), (U64, 2.0**64),
)
row(
    "cvt.rn.f32.f64", "f64 -> f32", (1 + 2.0**-24, 1.0), (1 + 2.0**-24 + 2.0**-50, 1 + u),
    (1 + u + 2.0**-24, 1 + 2 * u), (1e39, INF), (2.0**128 - 2.0**103, INF),
    (2.0**128 - 2.0**103 - 2.0**80, FLT_MAX), (2.0**-150, 0.0), (-(2.0**-150), -0.0),
    (2.0**-150 + 2.0**-180, FLT_TINY), (3 * 2.0**-150, 2 * FLT_TINY), (-INF, -INF), (NAN, NAN),
    (-0.0, -0.0),
)
row(
    "cvt.f64.f32", "f32 -> f64", (FLT_TINY, FLT_TINY), (-FLT_MAX, -FLT_MAX), (-0.0, -0.0),
    (INF, INF), (NAN, NAN),
)
row(
    "cvt.f32.f16", "b16 -> f32", (0x0001, 2.0**-24), (0x03FF, 1023 * 2.0**-24), (0x0400, 2.0**-14),
    (0x3C01, 1 + 2.0**-10), (0x7BFF, 65504.0), (0xFBFF, -65504.0), (0x8000, -0.0), (0xFC00, -INF),
    (0x7C00, INF), (0x7E00, NAN), (0xFC01, NAN),
)
row(
    "cvt.f32.bf16", "b16 -> f32", (0x3F81, 1 + 2.0**-7), (0x0001, 2.0**-133), (0x8000, -0.0),
    (0xFF80, -INF), (0x7F7F, 2.0**128 - 2.0**120), (0x7FC0, NAN), (0x7F81, NAN),
)
row(
    "cvt.rn.f16.f32", "f32 -> f16", (1.0, 0x3C00), (1 + 2.0**-11, 0x3C00),
    (1 + 3 * 2.0**-11, 0x3C02), (1 + 2.0**-11 + u, 0x3C01), (65519.99609375, 0x7BFF),
    (65520.0, 0x7C00), (-65520.0, 0xFC00), (FLT_MAX, 0x7C00), (-INF, 0xFC00), (2.0**-25, 0),
    (-(2.0**-25), 0x8000), (2.0**-25 + 2.0**-48, 1), (3 * 2.0**-25, 2),
    (2.0**-14 - 2.0**-25, 0x0400), (2.0**-14, 0x0400), (1023 * 2.0**-24, 0x03FF), (FLT_TINY, 0),
    (-0.0, 0x8000), (NAN, NAN), (2047 * 2.0**-11, 0x3BFF),
)
row(
    "cvt.rn.bf16.f32", "b32 -> bf16", (0x3F808000, 0x3F80), (0x3F818000, 0x3F82),
    (0x3F808001, 0x3F81), (0x3F807FFF, 0x3F80), (0xBF818000, 0xBF82), (0x7F7FFFFF, 0x7F80),
    (0x7F7F7FFF, 0x7F7F), (0x7F7F8000, 0x7F80), (0xFF800000, 0xFF80), (0x7F800001, NAN),
    (0xFFFFFFFF, NAN), (0x80000000, 0x8000), (0x00008000, 0), (0x00018000, 2), (0x007FFFFF, 0x80),
)
# The first number goes to the upper half.
row(
    "cvt.rn.f16x2.f32", "f32 f32 -> b32", (1.0, -2.0, 0x3C00C000), (65520.0, 2.0**-24, 0x7C000001),
    (-0.0, 1 + 3 * 2.0**-11, 0x80003C02),
)
row(
    "cvt.rn.bf16x2.f32", "f32 f32 -> b32", (1.0, -2.0, 0x3F80C000), (INF, 1 + 2.0**-8, 0x7F803F80),
    (1 + 3 * 2.0**-8, -0.0, 0x3F828000),
)
# fmt: on

# Operations of a warp: the 32 threads of a block are the cases. Lanes outside the mask skip it.
ALL, LANES = U32, range(32)


def members(mask: int) -> list[int]:
    return [mask >> lane & 1 for lane in LANES]


def shuffles(
    mode: str,
    b: int | list[int],
    c: int,
    sources: Iterable[int],
    inside: Iterable[int],
    mask: int = ALL,
) -> None:
    """`sources` is the lane whose value each lane gets, `inside` its predicate."""
    amounts = b if isinstance(b, list) else [b] * 32
    row(
        f"shfl.sync.{mode}.b32",
        "pred b32 b32 b32 b32 -> b32 pred",
        *[
            (
                member,
                0xFFFF0000 + lane,
                amount,
                c,
                mask,
                *((0xFFFF0000 + source, p) if member else (ANY, ANY)),
            )
            for lane, member, amount, source, p in zip(
                LANES, members(mask), amounts, sources, inside, strict=True
            )
        ],
        kinds="pssss",
        guarded=True,
    )


# c = maximum | segments << 8. A lane without a source keeps its own value, and its predicate is 0.
shuffles("up", 1, 0, [0, *range(31)], [0] + [1] * 31)
shuffles("up", 16, 0, [*range(16), *range(16)], [0] * 16 + [1] * 16)
shuffles("up", 3, 0x1800, [x if x % 8 < 3 else x - 3 for x in LANES], [x % 8 >= 3 for x in LANES])
shuffles("up", 33, 0, [0, *range(31)], [0] + [1] * 31)  # modulo 32
shuffles("up", 1, 0x02, [*range(3), *range(2, 31)], [0] * 3 + [1] * 29)  # nothing below lane 2
shuffles("up", 0, 0, LANES, [1] * 32)
shuffles("down", 1, 0x1F, [*range(1, 32), 31], [1] * 31 + [0])
shuffles("down", 16, 0x1F, [*range(16, 32), *range(16, 32)], [1] * 16 + [0] * 16)
shuffles("down", 5, 0x1807, [x if x % 8 > 2 else x + 5 for x in LANES], [x % 8 <= 2 for x in LANES])
shuffles(
    "down", 4, 0x0B, [*range(4, 12), *range(8, 32)], [1] * 8 + [0] * 24
)  # nothing above lane 11
shuffles("bfly", 1, 0x1F, [x ^ 1 for x in LANES], [1] * 32)
shuffles("bfly", 31, 0x1F, [31 - x for x in LANES], [1] * 32)
# In segments of eight, lanes of lower segments are sources, and those above the maximum are not.
shuffles(
    "bfly", 8, 0x1807, [x if x % 16 < 8 else x - 8 for x in LANES], [x % 16 >= 8 for x in LANES]
)
shuffles("idx", 7, 0x1F, [7] * 32, [1] * 32)
shuffles("idx", 39, 0x1F, [7] * 32, [1] * 32)
shuffles(
    "idx", [(x * 5 + 3) % 32 for x in LANES], 0x1F, [(x * 5 + 3) % 32 for x in LANES], [1] * 32
)
shuffles("idx", 10, 0x1807, [x // 8 * 8 + 2 for x in LANES], [1] * 32)  # lane 2 of each segment
shuffles("idx", 6, 0x1803, LANES, [0] * 32)  # above the maximum
# Partial masks: even lanes alone, and lanes 8 to 15.
shuffles("down", 2, 0x1F, [*range(2, 32), 30, 31], [1] * 30 + [0] * 2, mask=0x55555555)
shuffles("bfly", 4, 0x1F, [x ^ 4 for x in LANES], [1] * 32, mask=0x0000FF00)
shuffles("idx", 9, 0x1F, [9] * 32, [1] * 32, mask=0x0000FF00)
shuffles("up", 1, 0x08, [x - (x > 8) for x in LANES], [x > 8 for x in LANES], mask=0x0000FF00)


def votes(votes_of: Callable[[int], int], mask: int) -> None:
    """Lanes outside the mask vote for what would change the result."""
    inside = [lane for lane in LANES if mask >> lane & 1]
    ballot = sum(votes_of(lane) << lane for lane in inside)
    for mode, kind, result in (
        ("ballot.b32", "b32", ballot),
        ("any.pred", "pred", int(ballot != 0)),
        ("all.pred", "pred", int(ballot == mask)),
    ):
        row(
            f"vote.sync.{mode}",
            f"pred pred b32 -> {kind}",
            *[
                (member, votes_of(lane), mask, result if member else ANY)
                for lane, member in enumerate(members(mask))
            ],
            guarded=True,
        )


votes(lambda lane: lane % 3 == 0, ALL)
votes(lambda lane: 0, ALL)
votes(lambda lane: 1, ALL)
votes(lambda lane: lane < 8, 0x0000FF00)
votes(lambda lane: lane >= 8, 0x0000FF00)
votes(lambda lane: lane == 31, 0xF0000001)


def reductions(values: list[int], mask: int) -> None:
    inside = [values[lane] for lane in LANES if mask >> lane & 1]
    for kind in ("s32", "u32"):
        read = [x & U32 for x in inside]
        if kind == "s32":
            read = [x - 2**32 if x >= S32 else x for x in read]
        for name, result in (("add", sum(read)), ("min", min(read)), ("max", max(read))):
            row(
                f"redux.sync.{name}.{kind}",
                f"pred {kind} b32 -> {kind}",
                *[
                    (member, x, mask, result if member else ANY)
                    for member, x in zip(members(mask), values, strict=True)
                ],
                guarded=True,
            )


reductions([lane - 16 for lane in LANES], ALL)
reductions([-S32 + lane for lane in LANES], ALL)  # the sum wraps around
reductions([(lane * 7919 - 100_000) * 4001 for lane in LANES], 0x00F0F00F)
reductions([lane - 3 for lane in LANES], 0x00000004)  # one lane alone


# Loads and stores. Bytes in memory are little-endian; a narrow integer fills its register with its
# sign or with zeros; a vector is its elements, one after the other.
@dataclass(frozen=True)
class Kernel:
    name: str
    body: str
    forms: tuple[str, ...]  # each with its kinds of operands


KERNELS: dict[str, Kernel] = {}


def kernel(name: str, body: str, *forms: str) -> None:
    assert name not in KERNELS
    KERNELS[name] = Kernel(name, body, forms)


LOADS = {
    "ld.param.": "u8 u16 u32 s32 b32 f32 u64 b64",
    "ld.param.v2.": "u32 u64",
    "ld.global.": "u8 b8 u16 b16 u32 s32 b32 f32 u64 b64 f64",
    "ld.global.v2.": "b32 u32 f32 b64 u64",
    "ld.global.v4.": "b32 u32 f32",
    "ld.global.cg.": "f32 b64 u64 f64",
    "ld.global.cg.v2.": "u64",
    "ld.acquire.gpu.global.": "u32 u64",
    "ld.relaxed.gpu.global.": "u32 u64",
    "ld.": "f32 f64",
    "ld.shared.": "u8 b8 u16 b16 u32 s32 b32 f32 u64 b64 f64",
    "ld.shared.v2.": "b16 u32 b32 f32 u64 b64 f64",
    "ld.shared.v4.": "b16 u32 b32 f32",
}
STORES = {
    "st.global.": "u8 b8 u16 b16 u32 b32 f32 u64 b64 f64",
    "st.global.v2.": "b32 f32 b64",
    "st.global.v4.": "b32 u32 f32",
    "st.relaxed.gpu.global.": "u32 u64",
    "st.release.gpu.global.": "u32 u64",
    "st.": "f32 f64",
    "st.v4.": "f32",
    "st.shared.": "u8 b8 u16 b16 u32 b32 f32 u64 b64 f64",
    "st.shared.v2.": "b8 b32 f32 b64 f64",
    "st.shared.v4.": "b16 b32 u32 f32",
}
for prefix in [*LOADS, *STORES]:
    table = LOADS if prefix in LOADS else STORES
    if ".shared." in prefix:
        table[prefix.replace("shared", "shared::cta")] = table[prefix]
REGION = 64  # bytes; what is accessed begins at byte 16
TO_SHARED = " ".join(
    f"ld.global.b64 %d0, [%in+{i}]; st.shared.b64 [memory+{i}], %d0;" for i in range(0, REGION, 8)
)
FROM_SHARED = " ".join(
    f"ld.shared.b64 %d0, [memory+{i}]; st.global.b64 [%out+{i}], %d0;" for i in range(0, REGION, 8)
)


def accesses(table: dict[str, str]) -> list[tuple[str, int, str, int]]:
    """(name of a kernel, how many, type, form) of each."""
    return [
        (f"{prefix}{kind}", int(prefix[-2]) if ".v" in prefix else 1, kind, bits_of(kind) // 8)
        for prefix, kinds in table.items()
        for kind in kinds.split()
    ]


def identifier(form: str) -> str:
    return form.replace(".", "_").replace(":", "_")


def registers(kind: str, count: int) -> tuple[list[str], str]:
    """Of 64 bits if the type allows it, and as an operand."""
    letter = "r" if kind == "f32" else "d"
    names = [f"%{letter}{4 + i}" for i in range(count)]
    return names, names[0] if count == 1 else "{" + ", ".join(names) + "}"


def space_of(form: str) -> str:
    found = [space for space in ("param", "global", "shared") if f".{space}" in form]
    return found[0] if found else "generic"


# What reads from "%d3 + 16", and from where; generic addresses are tried in both spaces.
BASES = {
    "param": [("", "mov.u64 %d3, given;")],
    "global": [("", "mov.u64 %d3, %in;")],
    "shared": [("", "mov.u64 %d3, memory;")],
    "generic": [
        ("_of_global", "mov.u64 %d3, %in;"),
        ("_of_shared", "mov.u64 %d2, memory; cvta.shared.u64 %d3, %d2;"),
    ],
}
for form, count, kind, _size in accesses(LOADS):
    names, operand = registers(kind, count)
    keep = " ".join(
        f"st.global.b{32 if name[1] == 'r' else 64} [%out+{8 * i}], {name};"
        for i, name in enumerate(names)
    )
    kinds = "da" if count == 1 else f"D{count}a"
    for suffix, base in BASES[space_of(form)]:
        kernel(
            identifier(form) + suffix,
            f"{TO_SHARED} {base} {form} {operand}, [%d3+16]; {keep}",
            f"{form} {kinds}",
        )
for form, count, kind, _size in accesses(STORES):
    names, operand = registers(kind, count)
    give = " ".join(
        f"ld.global.b{32 if name[1] == 'r' else 64} {name}, [%in+{8 * i}];"
        for i, name in enumerate(names)
    )
    kinds = "as" if count == 1 else f"aS{count}"
    for suffix, base in BASES[space_of(form)]:
        base = base.replace("%in", "%out")
        in_shared = "memory" in base
        kernel(
            identifier(form) + suffix,
            f"{TO_SHARED.replace('%in', '%out')} {base} {give} {form} [%d3+16], {operand}; "
            + (FROM_SHARED if in_shared else ""),
            f"{form} {kinds}",
        )


def pattern(count: int, seed: int) -> bytes:
    """Bytes of both signs, of which none repeats soon."""
    return bytes((0x80 + 37 * (i + seed)) % 251 for i in range(count))


@pytest.mark.parametrize("form, count, kind, size", accesses(LOADS), ids=lambda x: str(x))
def test_loads(form: str, count: int, kind: str, size: int) -> None:
    memory = pattern(REGION, seed=1)
    for suffix, _ in BASES[space_of(form)]:
        given = [(ctypes.c_char * REGION).from_buffer_copy(memory)] if "param" in form else []
        out = ptx_kernels.run(identifier(form) + suffix, memory, 8 * count, more=given)
        for i in range(count):
            element = memory[16 + size * i : 16 + size * (i + 1)]
            wide = int.from_bytes(element, "little", signed=kind.startswith("s"))
            stored = 4 if kind == "f32" else 8
            expected = (wide & (2 ** (8 * stored) - 1)).to_bytes(stored, "little")
            assert out[8 * i : 8 * i + stored] == expected, suffix


@pytest.mark.parametrize("form, count, kind, size", accesses(STORES), ids=lambda x: str(x))
def test_stores(form: str, count: int, kind: str, size: int) -> None:
    before, values = pattern(REGION, seed=5), pattern(32, seed=99)
    low = b"".join(values[8 * i : 8 * i + size] for i in range(count))
    expected = before[:16] + low + before[16 + len(low) :]
    for suffix, _ in BASES[space_of(form)]:
        assert ptx_kernels.run(identifier(form) + suffix, values, before) == expected, suffix


# The generic address of global memory is the address; that of shared memory is another, and back.
kernel(
    "addresses",
    """
  cvta.to.global.u64 %d1, %in; sub.s64 %d1, %d1, %in; st.global.b64 [%out], %d1;
  cvta.global.u64 %d2, %in; sub.s64 %d2, %d2, %in; st.global.b64 [%out+8], %d2;
  mov.u64 %d3, memory; add.s64 %d3, %d3, 8; cvta.shared.u64 %d4, %d3;
  mov.b32 %r0, 0f40490FDB; st.f32 [%d4], %r0; ld.shared.b32 %r1, [memory+8];
  st.global.b32 [%out+16], %r1;
  cvta.to.shared.u64 %d5, %d4; sub.s64 %d5, %d5, %d3; st.global.b64 [%out+24], %d5;""",
    *(f"cvta.{x}.u64 ds" for x in ("to.global", "global", "shared", "to.shared")),
)


def test_generic_addresses() -> None:
    out = np.frombuffer(ptx_kernels.run("addresses", bytes(8), 32), np.uint64)
    assert list(out[[0, 1, 3]]) == [0, 0, 0] and int(out[2]) & U32 == 0x40490FDB


# All threads of all blocks add to one counter: each gets what was there before it.
for kind, form in (("u32", "atom.global.add.u32"), ("u64", "atom.global.gpu.acq_rel.add.u64")):
    letter, bits = ("r", 32) if kind == "u32" else ("d", 64)
    kernel(
        f"count_{kind}",
        f"""
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %thread;
  mad.wide.u32 %d1, %r3, 8, %out;
  {form} %{letter}8, [%out], 3;
  mov.u64 %d4, 0; cvt.u64.u32 %d4, %r8; st.global.b64 [%d1+8], %{"d4" if bits == 32 else "d8"};""",
        f"{form} das",
    )


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_atomics_count_every_thread_once(kind: str) -> None:
    first = 2 ** int(kind[1:]) - 30  # the sum wraps around
    before = first.to_bytes(8, "little") + bytes(8 * 120)
    made = ptx_kernels.run(f"count_{kind}", bytes(8), before, block=40, grid=3)
    out = np.frombuffer(made, np.uint64)
    modulus = 2 ** int(kind[1:])
    assert int(out[0]) % modulus == (first + 360) % modulus
    assert sorted(map(int, out[1:])) == sorted((first + 3 * i) % modulus for i in range(120))


# Asynchronous copies: 48 bytes in three groups, of which a wait leaves one pending.
COPIES = "cp.async.{level}.shared.global [memory+{to}], [%in+{to}], {bytes}{given};"
for level, size in (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)):
    for given in range(-1, size + 1):  # -1: all of them, by the form that does not say so
        amount = "" if given < 0 else ", %r1"
        copy = COPIES.format(level=level, to=16, bytes=size, given=amount)
        kernel(
            f"copy_{level}_{size}_{given + 1}",
            f"""
  mov.u64 %d1, 0x1111111111111111; mov.u32 %r1, {max(given, 0)};
  {" ".join(f"st.shared.b64 [memory+{i}], %d1;" for i in range(0, REGION, 8))}
  {copy} cp.async.wait_all; {FROM_SHARED}""",
            f"cp.async.{level}.shared.global aai{'' if given < 0 else 's'}",
            "cp.async.wait_all ",
        )


@pytest.mark.parametrize("level, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_asynchronous_copies_fill_with_zeros(level: str, size: int) -> None:
    memory = pattern(REGION, seed=3)
    for given in range(-1, size + 1):
        out = ptx_kernels.run(f"copy_{level}_{size}_{given + 1}", memory, REGION)
        count = size if given < 0 else given
        copied = memory[16 : 16 + count] + bytes(size - count)
        assert out == b"\x11" * 16 + copied + b"\x11" * (REGION - 16 - size), given


OUT = "ld.shared.b64 %d1, [memory+{0}]; st.global.b64 [%out+{0}], %d1;"
kernel(
    "copy_groups",
    " ".join(
        [
            *(
                COPIES.format(level="cg", to=i, bytes=16, given="") + " cp.async.commit_group;"
                for i in (0, 16, 32)
            ),
            "cp.async.wait_group 1;",
            *(OUT.format(i) for i in range(0, 32, 8)),
            "cp.async.wait_group 0;",
            *(OUT.format(i) for i in range(32, 48, 8)),
        ]
    ),
    "cp.async.commit_group ",
    "cp.async.wait_group i",
)


def test_groups_of_asynchronous_copies() -> None:
    memory = pattern(48, seed=7)
    assert ptx_kernels.run("copy_groups", memory, 48) == memory


# Matrices. Where the ISA puts element (row, column) of a fragment, as its figures say:
# (lane, register, half of the register).
def a_of_16(row: int, column: int) -> tuple[int, int, int]:  # 16 x 16 numbers of 16 bits
    return row % 8 * 4 + column % 8 // 2, row // 8 + column // 8 * 2, column % 2


def b_of_16(row: int, column: int) -> tuple[int, int, int]:  # 16 x 8
    return column * 4 + row % 8 // 2, row // 8, row % 2


def a_of_tf32(row: int, column: int) -> tuple[int, int, int]:  # 16 x 8
    return row % 8 * 4 + column % 4, row // 8 + column // 4 * 2, 0


def b_of_tf32(row: int, column: int) -> tuple[int, int, int]:  # 8 x 8
    return column * 4 + row % 4, row // 4, 0


def c_of_f32(row: int, column: int) -> tuple[int, int, int]:  # 16 x 8
    return row % 8 * 4 + column // 2, row // 8 * 2 + column % 2, 0


Place = Callable[[int, int], tuple[int, int, int]]


def fragment(matrix: np.ndarray, place: Place, count: int, bits: int) -> np.ndarray:
    """The registers of 32 lanes that hold a matrix of integers of so many bits."""
    words = np.zeros((32, count), np.uint32)
    for (row, column), value in np.ndenumerate(matrix):
        lane, register, half = place(row, column)
        words[lane, register] |= np.uint32(int(value) << bits * half)
    return words


def as_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def as_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32) >> 16


def as_f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


MULTIPLICATIONS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray], Place, Place, int]] = {
    "m16n8k16.row.col.f32.f16.f16.f32": (16, as_f16, a_of_16, b_of_16, 16),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, as_bf16, a_of_16, b_of_16, 16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, as_f32, a_of_tf32, b_of_tf32, 32),
}


def some(letter: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{letter}{first + i}" for i in range(count)) + "}"


# Ten words of each lane of each block: a, b, c.
for form in MULTIPLICATIONS:
    kernel(
        identifier(form),
        f"""
  mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 32, %thread;
  mad.wide.u32 %in, %r1, 40, %in; mad.wide.u32 %out, %r1, 16, %out;
  {" ".join(f"ld.global.b32 %r{10 + i}, [%in+{4 * i}];" for i in range(10))}
  mma.sync.aligned.{form} {some("r", 17, 4)}, {some("r", 10, 4)}, {some("r", 14, 2)},
    {some("r", 16, 4)};
  {" ".join(f"st.global.b32 [%out+{4 * i}], %r{17 + i};" for i in range(4))}""",
        f"mma.sync.aligned.{form} D4S4S2S4",
    )


@pytest.mark.parametrize("form", MULTIPLICATIONS)
def test_multiplications_of_matrices(form: str) -> None:
    """Each element of A, B and C alone among zeros, which locates it; then all of them."""
    depth, encode, place_a, place_b, bits = MULTIPLICATIONS[form]
    grid = np.arange
    full_a = (grid(16 * depth).reshape(16, depth) % 61 - 30.0) / 4
    full_b = (grid(depth * 8).reshape(depth, 8) % 53 - 26.0) / 2
    full_c = grid(128).reshape(16, 8) - 60.0
    triples = [(full_a, full_b, full_c), (0 * full_a, 0 * full_b, full_c)]
    for row, column in np.ndindex(16, depth):
        alone = np.zeros((16, depth))
        alone[row, column] = 1
        triples.append((alone, full_b, 0 * full_c))
    for row, column in np.ndindex(depth, 8):
        alone = np.zeros((depth, 8))
        alone[row, column] = 1
        triples.append((full_a, alone, 0 * full_c))
    lanes = [
        np.hstack(
            [
                fragment(encode(a), place_a, 4, bits),
                fragment(encode(b), place_b, 2, bits),
                fragment(as_f32(c), c_of_f32, 4, 32),
            ]
        )
        for a, b, c in triples
    ]
    inputs = np.stack(lanes).astype(np.uint32).tobytes()
    blocks = len(triples)
    out = ptx_kernels.run(identifier(form), inputs, 512 * blocks, block=32, grid=blocks)
    made = np.frombuffer(out, np.float32).reshape(blocks, 32, 4)
    for block, (a, b, c) in enumerate(triples):
        expected = a @ b + c
        for row, column in np.ndindex(16, 8):
            lane, register, _ = c_of_f32(row, column)
            assert made[block, lane, register] == expected[row, column], (block, row, column)


# ldmatrix and stmatrix move 8 x 8 numbers of 16 bits. Lane 8 m + r has the address of row r of
# matrix m; lane l holds row l / 4, columns 2 (l % 4) and the next, of the transposed if .trans.
TRANSFERS = [(count, trans) for count in (1, 2, 4) for trans in ("", ".trans")]
ROW_BYTES = 48  # from one row to the next, in an order that no formula of the machine has


def row_at(matrix: int, row: int) -> int:
    return ROW_BYTES * ((5 * (8 * matrix + row) + 3) % 32)


WORDS = range(0, 32 * ROW_BYTES, 128)  # of a lane, so that the warp has all of them

for count, trans in TRANSFERS:
    form = f"matrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
    address = """
  mad.wide.u32 %d1, %thread, 4, %in; mad.wide.u32 %d2, %thread, 16, %in;
  mad.wide.u32 %d3, %thread, 4, %out; mad.wide.u32 %d4, %thread, 16, %out;
  mov.u32 %r2, memory; mad.lo.s32 %r5, %thread, 4, %r2;
  ld.global.b32 %r1, [%d1]; add.s32 %r1, %r1, %r2;"""
    fill, clear, keep = (
        " ".join(each.format(i, 128 + i) for i in WORDS)
        for each in (
            "ld.global.b32 %r3, [%d1+{1}]; st.shared.b32 [%r5+{0}], %r3;",
            "st.shared.b32 [%r5+{0}], 0xEEEEEEEE;",
            "ld.shared.b32 %r3, [%r5+{0}]; st.global.b32 [%d3+{0}], %r3;",
        )
    )
    take = " ".join(f"ld.global.b32 %r{10 + i}, [%d2+{128 + 4 * i}];" for i in range(count))
    give = " ".join(f"st.global.b32 [%d4+{4 * i}], %r{10 + i};" for i in range(count))
    held = some("r", 10, count)
    kernel(
        identifier(f"ld{form}"),
        f"{address} {fill} bar.sync 0; ld{form} {held}, [%r1]; {give}",
        f"ld{form} {'da' if count == 1 else f'D{count}a'}",
    )
    kernel(
        identifier(f"st{form}"),
        f"{address} {clear} {take} bar.sync 0; st{form} [%r1], {held}; bar.sync 0; {keep}",
        f"st{form} {'as' if count == 1 else f'aS{count}'}",
    )


def matrix_case(count: int, trans: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows' addresses, shared memory with all matrices, and what each lane holds of them."""
    addresses = np.array([row_at(lane // 8, lane % 8) for lane in LANES], np.uint32)
    memory = np.full(32 * ROW_BYTES // 2, 0xEEEE, np.uint16)
    held = np.full((32, 4, 2), 0xEEEE, np.uint16)
    for matrix in range(count):
        elements = 0x1000 * (matrix + 1) + 0x10 * np.arange(8)[:, None] + np.arange(8)
        for row in range(8):
            at = row_at(matrix, row) // 2
            memory[at : at + 8] = elements[row]
        seen = elements.T if trans else elements
        for lane in LANES:
            held[lane, matrix] = seen[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
    return addresses, memory, held


@pytest.mark.parametrize("count, trans", TRANSFERS)
def test_loads_of_matrices(count: int, trans: str) -> None:
    addresses, memory, held = matrix_case(count, trans)
    name = identifier(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16")
    out = ptx_kernels.run(name, addresses.tobytes() + memory.tobytes(), 512, block=32)
    assert (np.frombuffer(out, np.uint16).reshape(32, 4, 2) == held).all()


@pytest.mark.parametrize("count, trans", TRANSFERS)
def test_stores_of_matrices(count: int, trans: str) -> None:
    addresses, memory, held = matrix_case(count, trans)
    name = identifier(f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16")
    out = ptx_kernels.run(name, addresses.tobytes() + held.tobytes(), memory.nbytes, block=32)
    assert (np.frombuffer(out, np.uint16) == memory).all()


# Control flow and barriers.
kernel(
    "jumps",
    """
  mov.u32 %r1, 0; mov.u32 %r2, 0;
LOOP:
  setp.ge.s32 %p1, %r2, %thread;
  @%p1 bra DONE;
  add.s32 %r2, %r2, 1; add.s32 %r1, %r1, %r2;
  bra.uni LOOP;
  mov.u32 %r1, 1000;
DONE:
  mad.wide.u32 %d1, %thread, 4, %out; st.global.b32 [%d1], %r1;
  setp.eq.s32 %p2, %thread, 2;
  @%p2 exit;
  @!%p1 bra NEVER;
  st.global.b32 [%d1+64], %r1;
  ret;
NEVER:
  st.global.b32 [%d1], 77;""",
    "bra l",
    "bra.uni l",
    "exit ",
    "ret ",
)


def test_jumps() -> None:
    """The sum of 1 to the thread's number; thread 2 ends early."""
    out = np.frombuffer(ptx_kernels.run("jumps", bytes(8), bytes(128), block=5), np.uint32)
    assert list(out[:5]) == [0, 1, 3, 6, 10] and list(out[16:21]) == [0, 1, 0, 6, 10]


for name, barrier in (("bar.sync", "bar.sync 0"), ("barrier.sync", "barrier.sync 0")):
    kernel(
        identifier(name),
        f"""
  mov.u32 %r1, memory; mad.lo.s32 %r2, %thread, 4, %r1; st.shared.b32 [%r2], %thread;
  {barrier};
  sub.s32 %r3, 95, %thread; mad.lo.s32 %r3, %r3, 4, %r1; ld.shared.b32 %r4, [%r3];
  {barrier};
  st.shared.b32 [%r2], %r4;
  {barrier};
  ld.shared.b32 %r5, [%r3];
  mad.wide.u32 %d1, %thread, 8, %out; st.global.v2.b32 [%d1], {{%r4, %r5}};""",
        f"{name} s",
    )
# The even lanes alone: each reads what the next of them wrote.
kernel(
    "warp_barrier",
    """
  and.b32 %r1, %thread, 1; setp.ne.b32 %p1, %r1, 0; @%p1 bra DONE;
  mov.u32 %r1, memory; mad.lo.s32 %r2, %thread, 4, %r1; st.shared.b32 [%r2], %thread;
  bar.warp.sync 0x55555555;
  add.s32 %r3, %thread, 2; and.b32 %r3, %r3, 31; mad.lo.s32 %r3, %r3, 4, %r1;
  ld.shared.b32 %r4, [%r3];
  mad.wide.u32 %d1, %thread, 4, %out; st.global.b32 [%d1], %r4;
DONE:""",
    "bar.warp.sync s",
)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["bar_sync", "barrier_sync"])
def test_barriers_of_a_block(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATION_SEED", str(seed))
    out = np.frombuffer(ptx_kernels.run(name, bytes(8), 96 * 8, block=96), np.uint32).reshape(96, 2)
    assert (out[:, 0] == 95 - np.arange(96)).all() and (out[:, 1] == np.arange(96)).all()


@pytest.mark.parametrize("seed", range(5))
def test_barriers_of_a_warp(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATION_SEED", str(seed))
    out = np.frombuffer(ptx_kernels.run("warp_barrier", bytes(8), 128, block=32), np.uint32)
    assert list(out[::2]) == [*range(2, 32, 2), 0]


# A block publishes a number, the other polls a flag. The flag is released and acquired; both orders
# of blocks occur.
kernel(
    "hand_over",
    """
  mov.u32 %r1, %ctaid.x; setp.ne.s32 %p1, %r1, 0; @%p1 bra CONSUMER;
  ld.global.b32 %r2, [%in]; st.global.b32 [%out+16], %r2;
  st.release.gpu.global.u32 [%out], 1;
  ret;
CONSUMER:
  nanosleep.u32 20;
  ld.acquire.gpu.global.u32 %r3, [%out];
  setp.eq.s32 %p2, %r3, 0; @%p2 bra CONSUMER;
  ld.global.b32 %r4, [%out+16]; st.global.b32 [%out+32], %r4;""",
    "nanosleep.u32 s",
)


@pytest.mark.parametrize("seed", range(1, 21))
def test_blocks_hand_over(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATION_SEED", str(seed))
    monkeypatch.setenv("EMULATION_SHUFFLE", str(seed % 3))
    out = ptx_kernels.run("hand_over", (1234567).to_bytes(8, "little"), bytes(64), grid=2)
    assert out[32:36] == (1234567).to_bytes(4, "little")


def module() -> str:
    """One with a kernel for each row, and the others."""
    text = ptx_kernels.HEADER
    for i, each in enumerate(ROWS):
        text += each.text(f"row_{i}")
    for each in KERNELS.values():
        made = ptx_kernels.entry(each.name, each.body)
        if any(form.startswith("ld.param") for form in each.forms):
            given = f".param .align 16 .b8 given[{REGION}]"
            made = made.replace(".param .u64 outputs", f".param .u64 outputs, {given}")
        text += made
    return text


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    machine.load(module())


@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda i: str(ROWS[i]))
def test_values(index: int) -> None:
    row = ROWS[index]
    width = len(row.reads)
    inputs = b"".join(
        slot(kind, x) for case in row.cases for kind, x in zip(row.reads, case, strict=False)
    )
    size = 8 * len(row.writes)
    out = ptx_kernels.run(f"row_{index}", inputs, size * len(row.cases), block=len(row.cases))
    for i, case in enumerate(row.cases):
        for k, (kind, expected) in enumerate(zip(row.writes, case[width:], strict=True)):
            got = out[size * i + 8 * k : size * i + 8 * (k + 1)]
            assert same(kind, got, expected, row.ulps), (
                f"{row}: {case[:width]} gave 0x{int.from_bytes(got, 'little'):x}, not {expected}"
            )


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas")
def test_ptxas_accepts_these_kernels(tmp_path: Path) -> None:
    (tmp_path / "forms.ptx").write_text(module())
    output_of(
        "ptxas", "-arch=sm_100", str(tmp_path / "forms.ptx"), "-o", str(tmp_path / "forms.cubin")
    )


def test_every_form_has_a_case() -> None:
    tested = {f"{row.form} {row.kinds}" for row in ROWS}
    for each in KERNELS.values():
        for form in each.forms:
            assert form.split()[0] in each.body or form == "ret ", f"{each.name} has no {form}"
        tested |= set(each.forms)
    assert tested == {f"{name} {kinds}" for name, kinds in machine.forms()}
