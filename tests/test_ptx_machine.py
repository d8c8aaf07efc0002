"""The machine for PTX around its instructions: what it reads, what it refuses, what it reports.

Every mistake that it must notice is planted into a tiny kernel, which runs in a process of its own:
the machine ends it with code 99. The same kernel without the mistake passes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ptx_kernels
import pytest
from emulation.ptx import machine

pytestmark = pytest.mark.skipif(not ptx_kernels.AVAILABLE, reason="needs a C++ compiler")
HEADER = ptx_kernels.HEADER


def words(out: bytes) -> list[int]:
    return [int(x) for x in np.frombuffer(out, np.uint32)]


# What the machine has not learnt, and how it says so.
UNKNOWN = {
    "opcode": ("foo.s32 %r1, %r2;", "foo.s32"),
    "type": ("add.u8 %r1, %r2, %r3;", "add.u8"),
    "modifier": ("add.sat.s32 %r1, %r2, %r3;", "add.sat.s32"),
    "modifiers in another order": ("ld.v2.global.b32 {%r1, %r2}, [%in];", "ld.v2.global.b32"),
    "all that is unknown": ("foo.s32 %r1; bar.f32 %r1;", "bar.f32\nfoo.s32"),
    "too few operands": ("add.s32 %r1, %r2;", "add.s32 with operands of other kinds"),
    "too many operands": ("add.s32 %r1, %r2, %r3, %r4;", "add.s32 with operands of other kinds"),
    "no operand between commas": ("add.s32 %r1, , %r3;", "add.s32 with operands of other kinds"),
    "vector for a register": (
        "add.s32 %r1, {%r2, %r3}, 1;",
        "add.s32 with operands of other kinds",
    ),
    "register for a vector": (
        "ld.global.v2.b32 %r1, [%in];",
        "ld.global.v2.b32 with operands of other kinds",
    ),
    "vector of another length": (
        "ld.global.v2.b32 {%r1, %r2, %r3}, [%in];",
        "with operands of other kinds",
    ),
    "address for a register": ("mov.u32 %r1, [%r2];", "mov.u32 with operands of other kinds"),
    "register for an address": (
        "ld.global.b32 %r1, %in;",
        "ld.global.b32 with operands of other kinds",
    ),
    "thread count of a barrier": ("bar.sync 0, 32;", "bar.sync with operands of other kinds"),
    "operand": ("add.s32 %r1, %r2, nothing;", "line LINE: operand nothing"),
    "register": ("add.s32 %q1, %r2, %r3;", "line LINE: register %q1"),
    "register of a family": ("add.s32 %r48, %r2, %r3;", "line LINE: register %r48"),
    "register beyond all": ("mov.u32 %r99999999999, 0;", "line LINE: register %r99999999999"),
    "special register": ("mov.u32 %r1, %warpid;", "line LINE: operand %warpid"),
    "number to write": ("mov.u32 5, %r1;", "line LINE: register 5"),
    "register for a number": ("lop3.b32 %r1, %r2, %r3, %r4, %r5;", "line LINE: number %r5"),
    "register as an offset": ("ld.global.b32 %r1, [%in+%d1];", "line LINE: number %d1"),
    "decimal fraction": ("add.f32 %r1, %r2, 1.5;", "line LINE: number 1.5"),
    "digit": ("mov.u32 %r1, 09;", "line LINE: number 09"),
    "float with a digit too few": ("mov.f32 %r1, 0f3F80000;", "line LINE: number 0f3F80000"),
    "float among doubles": ("add.f64 %d1, %d2, 0f3F800000;", "0f3F800000 of add.f64"),
    "double among floats": ("add.f32 %r1, %r2, 0d3FF0000000000000;", "of add.f32"),
    "negated operand": ("vote.sync.any.pred %p1, !%p2, -1;", "line LINE: operand !%p2"),
    "guard": ("@%q1 ret;", "line LINE: register %q1"),
    "label": ("bra NOWHERE;", "line LINE: label NOWHERE"),
    "label of an inner scope": ("{ INNER: } bra INNER;", "label INNER"),
    "second label": ("TWICE: TWICE: ret;", "line LINE: a second label TWICE"),
    "second register": (".reg .b32 %r<3>;", "line LINE: a second register %r"),
    "register of an inner scope": ("{ .reg .b32 inner; } mov.u32 inner, 0;", "register inner"),
    "type of a register": (".reg .b128 %q<2>;", "line LINE: type .b128"),
    "directive of a body": (".local .b32 local;", "line LINE: directive .local"),
    "too many registers": (".reg .b32 %m<30000>;", "line LINE: more registers than the stack"),
    "far too many registers": (".reg .b32 %m<4294967299>;", "more registers than the stack"),
}


@pytest.mark.parametrize("body, message", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_stops_the_reading(body: str, message: str) -> None:
    text = HEADER + ptx_kernels.entry("unknown", f"// here\n{body}")
    line = text.split("// here")[0].count("\n") + 2
    with pytest.raises(ValueError, match=re.escape(message.replace("LINE", str(line)))):
        machine.load(text)


def test_registers_and_constants_lie_on_one_stack() -> None:
    body = " ".join(f"mov.u32 %r1, {i};" for i in range(25000))
    with pytest.raises(ValueError, match="crowded: more registers and constants than the stack"):
        machine.load(HEADER + ptx_kernels.entry("crowded", body))


MODULES = {
    "a directive": (".const .b32 there;", "line 6: directive .const"),
    "a use of global memory": (
        ".global .b32 there; .entry k() { .reg .b64 %d<1>; mov.u64 %d0, there; }",
        "line 6: operand there",
    ),
    "a function": (".func f() { ret; }", "line 6: directive .func"),
    "an external variable": (".extern .global .b32 there;", "line 6: type .global"),
    "a type": (".shared .b128 wide;", "line 6: type .b128"),
    "a vector": (".shared .v4 .f32 wide;", "line 6: type .v4"),
    "two dimensions": (".shared .b32 table[4][8];", "line 6: variable table[4][8]"),
    "two variables": (".shared .b32 one, two;", "line 6: variable one, two"),
    "no name": (".shared .b32 ;", "line 6: variable"),
    "a limit": (".entry k() .reqnctapercluster 2 { ret; }", "directive .reqnctapercluster"),
    "no body": (".entry k()", "line 6: an entry without an end"),
    "no end": (".entry k() { ret;", "line 6: an entry without an end"),
    "no name of a parameter": (".entry k(.param .u64) { ret; }", "line 6: variable"),
}


@pytest.mark.parametrize("text, message", MODULES.values(), ids=MODULES)
def test_what_is_unknown_in_a_module(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        machine.load(HEADER + "\n" + text)


# What is stored to %out, and its first words after it.
READ = {
    "numbers": (
        """mov.u32 %r0, 0x1F; mov.u32 %r1, 017; mov.u32 %r2, 0b101; mov.u32 %r3, 12U;
        mov.u32 %r4, -7; mov.u32 %r5, 0xFFFFFFFFU; mov.u32 %r6, 0; mov.f32 %r7, 0f3F800000;
        mov.f64 %d0, 0D3FF8000000000000; mov.b64 {%r8, %r9}, %d0;
        mov.u32 %r10, -0x10; mov.u32 %r11, 0U;""",
        [31, 15, 5, 12, 2**32 - 7, 2**32 - 1, 0, 0x3F800000, 0, 0x3FF80000, 2**32 - 16, 0],
    ),
    "addresses": (
        """add.s64 %d1, %in, 16;
        ld.global.b32 %r0, [%d1+-16]; ld.global.b32 %r1, [%d1]; ld.global.b32 %r2, [ %d1 + 4 ];
        ld.global.b32 %r3, [%d1+0x8]; st.shared.b32 [memory+12], 9; mov.u32 %r6, memory;
        ld.shared.b32 %r4, [%r6+12]; mov.u64 %d2, inputs; ld.param.u64 %d3, [%d2];
        ld.param.b32 %r5, [inputs+4]; sub.s64 %d3, %d3, %in; mov.b64 {%r6, %r7}, %d3;
        shr.u64 %d4, %in, 32; cvt.u32.u64 %r8, %d4; sub.s32 %r5, %r5, %r8;""",
        [100, 104, 105, 106, 9, 0, 0, 0],
    ),
    "registers": (
        """.reg .b32 a, b , c; .reg .b32 x1, x<3>; .reg .b64 wide<2>, %rd2_;
        mov.u32 a, 1; mov.u32 b, 2; mov.u32 c, 3; mov.u32 x1, 10; mov.u32 x0, 11; mov.u32 x2, 12;
        mov.u64 wide1, 13; mov.u64 %rd2_, 14;
        mov.u32 %r0, a; mov.u32 %r1, b; mov.u32 %r2, c; mov.u32 %r3, x1; mov.u32 %r4, x0;
        mov.u32 %r5, x2; cvt.u32.u64 %r6, wide1; cvt.u32.u64 %r7, %rd2_;""",
        [1, 2, 3, 10, 11, 12, 13, 14],
    ),
    "scopes": (
        """.reg .b32 outer; mov.u32 outer, 1; mov.u32 %r9, 20;
        { .reg .b32 outer, %r<10>; mov.u32 outer, 2; mov.u32 %r9, 21; mov.u32 %r20, outer;
          { .reg .b32 outer; mov.u32 outer, 3; mov.u32 %r21, outer; }
          mov.u32 %r22, outer; }
        mov.u32 %r0, outer; mov.u32 %r1, %r20; mov.u32 %r2, %r21; mov.u32 %r3, %r22;
        mov.u32 %r4, %r9;""",
        [1, 2, 3, 2, 20],
    ),
    "labels": (
        """mov.u32 %r0, 0; mov.u32 %r1, 0; mov.u32 %r2, 5;
        bra $L__BB0_2;
        $L__BB0_1: mov.u32 %r0, 99;
        $L__BB0_2:
        { setp.eq.u32 %p1, %r2, 5; @%p1 bra AGAIN; mov.u32 %r0, 98; AGAIN: add.s32 %r1, %r1, 1; }
        { setp.eq.u32 %p1, %r2, 5; @%p1 bra AGAIN; mov.u32 %r0, 97; AGAIN: add.s32 %r1, %r1, 1; }
        { @%p1 bra _out; mov.u32 %r0, 96; }
        _out:add.s32 %r1, %r1, 1;""",
        [0, 3, 5],
    ),
    "guards": (
        """setp.eq.u32 %p1, %thread, 0; mov.u32 %r0, 0; mov.u32 %r1, 0; mov.u32 %r2, 7;
        @%p1 mov.u32 %r0, 1; @!%p1 mov.u32 %r1, 1; @!%p1 bra THERE; mov.u32 %r2, 8; THERE:""",
        [1, 0, 8],
    ),
    "vectors of one element": (
        """ld.global.b32 { %r0 }, [ %in + 0 ]; mov.b32 {%r1}, {7}; st.global.b32 [%out+8], {%r0};
        ld.global.b32 %r2, [%out+8];""",
        [100, 7, 100],
    ),
    "what is around instructions": (
        """.pragma "nounroll";
        .loc 1 23 5, function_name $L__info, inlined_at 1 34 5
        mov.u32 %r0, 1; /* mov.u32 %r0, 2; *//* and
        mov.u32 %r0, 3; */ // mov.u32 %r0, 4;
        .loc 1 24 5
        mov.u32
          %r1,
          5;
        ; mov.u32 %r2 , 6;mov.u32\t%r3,7;""",
        [1, 5, 6, 7],
    ),
    "nothing to write to": (
        """setp.eq.u32 %p1|_, %thread, 0; selp.b32 %r0, 1, 0, %p1;
        ld.global.v2.b32 {_, %r1}, [%in];
        atom.global.add.u32 _, [%out+60], 1; setp.ne.u32 _|%p2, %thread, 0;
        selp.b32 %r2, 1, 0, %p2; shfl.sync.idx.b32 %r3 | %p3, %r1, 0, 31, 1;""",
        [1, 101, 1, 101],
    ),
    "special registers": (
        """mov.u32 %r0, %ntid.x; mov.u32 %r1, %nctaid.x; mov.u32 %r2, %ctaid.x;
        mov.b32 %r3, %laneid;
        mov.u32 %r4, %tid.y; mov.u32 %r5, %ntid.z; mov.u32 %r6, %nctaid.y; mov.u32 %r7, %ctaid.z;
        add.s32 %r8, %ntid.x, %nctaid.x; mov.b32 {%h0, %h1}, %ntid.y; cvt.u32.u16 %r9, %h0;""",
        [1, 1, 0, 0, 0, 1, 1, 0, 2, 1],
    ),
    "shared memory of a body": (
        """.shared .align 8 .b8 mine[16]; .shared .b32 one;
        st.shared.b32 [mine+12], 4; st.shared.b32 [one], 5; st.shared.b32 [memory+4092], 6;
        ld.shared.b32 %r0, [mine+12]; ld.shared.b32 %r1, [one]; ld.shared.b32 %r2, [memory+4092];
        mov.u32 %r3, mine; mov.u32 %r4, one; sub.s32 %r3, %r4, %r3;""",
        [4, 5, 6, 16],
    ),
}


@pytest.mark.parametrize("body, expected", READ.values(), ids=READ)
def test_reading(body: str, expected: list[int]) -> None:
    store = " ".join(f"st.global.b32 [%out+{4 * i}], %r{i};" for i in range(len(expected)))
    machine.load(HEADER + ptx_kernels.entry("reading", body + store))
    inputs = np.arange(100, 116, dtype=np.uint32).tobytes()
    out = ptx_kernels.run("reading", inputs, bytes(64))
    assert words(out)[: len(expected)] == expected


def test_a_module_as_nvcc_writes_it() -> None:
    """Several kernels, debug information, parameters of all kinds, limits, dynamic memory."""
    machine.load(
        """//
// Generated by NVIDIA NVVM Compiler
//
.version 9.0
.target sm_90, debug
.address_size 64
\t// .globl\tfirst
.extern .shared .align 16 .b8 dynamic[];
.shared .align 4 .b8 fixed[20];
.file 1 "/a/b.cu"
.global .align 1 .b8 message[3] = {97, 98, 0};

.visible .entry first(
\t.param .u8 first_param_0,
\t.param .align 8 .b8 first_param_1[12],
\t.param .u64 .ptr .global .align 16 first_param_2
)
.maxntid 8, 4, 1
.minnctapersm 2
{
\t.reg .b32 \t%r<9>;
\t.reg .b64 \t%rd<4>;
\tld.param.u8 \t%r1, [first_param_0];
\tld.param.u32 \t%r2, [first_param_1+8];
\tld.param.u64 \t%rd1, [first_param_2];
\tmov.u32 \t%r3, dynamic;
\tmov.u32 \t%r4, fixed;
\tsub.s32 \t%r5, %r3, %r4;
\tst.shared.b32 \t[dynamic+28], %r1;
\tld.shared.b32 \t%r6, [dynamic+28];
\tst.global.v4.u32 \t[%rd1], {%r1, %r2, %r5, %r6};
\tret;
}
\t// .globl\tsecond
.weak .entry second(.param .u64 where)
{
\t.reg .b64 %rd<2>;
\tld.param.u64 %rd1, [where]; st.global.b32 [%rd1], 2; ret;
}
.entry third
.reqntid 32
{
\tret;
}
.section\t.debug_str
{
$L__info_string0:
.b8 95, 90
}
"""
    )
    out = ptx_kernels.Memory(bytes(16))
    where = machine.ctypes.c_uint64(out.address)
    pair = (machine.ctypes.c_uint32 * 3)(5, 6, 7)
    machine.launch("first", (1,), (1,), 32, [machine.ctypes.c_uint8(200), pair, where])
    assert words(out.content()) == [200, 7, 32, 200]  # behind 20 bytes, aligned to 16
    machine.launch("second", (1,), (1,), 0, [where])
    assert words(out.content())[0] == 2
    machine.launch("third", (1,), (8, 4), 0, [])
    with pytest.raises(RuntimeError, match="no GPU runs a grid"):
        machine.launch("third", (1,), (31,), 0, [])
    machine.launch("first", (1,), (8, 4), 32, [machine.ctypes.c_uint8(200), pair, where])
    with pytest.raises(RuntimeError, match="no GPU runs a grid"):
        machine.launch("first", (1,), (33,), 32, [machine.ctypes.c_uint8(200), pair, where])
    with pytest.raises(ValueError, match="second takes 1 parameters, not 0"):
        machine.launch("second", (1,), (1,), 0, [])
    out.free()


@pytest.mark.parametrize("align", [4, 16, 128])
def test_dynamic_memory_begins_no_further_than_its_alignment_says(align: int) -> None:
    text = f""".version 8.8
.target sm_100
.address_size 64
.shared .align 4 .b8 fixed[4];
.extern .shared .align {align} .b8 dynamic[];
"""
    body = """mov.u32 %r1, dynamic; mov.u32 %r2, fixed; sub.s32 %r1, %r1, %r2;
    st.global.b32 [%out], %r1;"""
    machine.load(text + ptx_kernels.entry("aligned", body))
    assert words(ptx_kernels.run("aligned", bytes(4), 4, shared=16)) == [align]


def test_a_kernel_of_the_same_name_takes_its_place() -> None:
    for number in (1, 2):
        machine.load(HEADER + ptx_kernels.entry("again", f"st.global.b32 [%out], {number};"))
        assert words(ptx_kernels.run("again", bytes(8), 4)) == [number]


@dataclass(frozen=True)
class Fault:
    """A kernel with <a mistake|what is right>, and what the report on the mistake says."""

    body: str
    message: str
    block: int = 1
    grid: int = 1
    shared: int = 0
    inputs: str = "01" * 72  # bytes; a5ff is what nobody wrote
    settings: dict[str, str] = field(default_factory=dict)

    def text(self, mistake: bool) -> str:
        return self._around(
            re.sub(r"<(.*?)\|(.*?)>", r"\1" if mistake else r"\2", self.body, flags=re.S)
        )

    def lines(self) -> range:
        """From that of the mistake to the end of the body."""
        before, _, after = self.body.partition("<")
        first = self._around(before + "<mistake").partition("<mistake")[0].count("\n") + 1
        return range(first, first + after.count("\n") + 1)

    @staticmethod
    def _around(body: str) -> str:
        dynamic = ".extern .shared .align 16 .b8 dynamic[];\n"
        return HEADER + dynamic + ptx_kernels.entry("planted", body)


ODD = "and.b32 %r1, %thread, 1; setp.eq.u32 %p1, %r1, 1;"
FRESH = "a5ff" * 36
SPINS = {"EMULATION_SPINS": "1000"}
FAULTS = {
    # Alignment.
    "two bytes off": Fault("ld.global.b32 %r1, [%in+<2|4>];", "misaligned access: 4 bytes"),
    "a byte off": Fault("st.global.u16 [%out+<1|2>], 0;", "misaligned access: 2 bytes"),
    "a pair": Fault("ld.global.v2.b32 {%r1, %r2}, [%in+<4|8>];", "misaligned access: 8 bytes"),
    "four words": Fault(
        "st.global.v4.b32 [%out+<8|16>], {0, 0, 0, 0};", "misaligned access: 16 bytes"
    ),
    "two doubles in shared memory": Fault(
        """mov.u64 %d1, 0; mov.u64 %d2, 0;
        st.shared.v2.f64 [memory+<8|16>], {%d1, %d2};""",
        "misaligned access: 16 bytes",
    ),
    "a parameter": Fault("ld.param.u32 %r1, [inputs+<2|4>];", "misaligned access: 4 bytes"),
    "an atomic": Fault(
        "atom.global.gpu.acq_rel.add.u64 %d1, [%out+<4|8>], 1;", "misaligned access: 8 bytes"
    ),
    "a flag": Fault("st.release.gpu.global.u32 [%out+<2|4>], 1;", "misaligned access: 4 bytes"),
    "a generic address": Fault(
        """mov.u64 %d1, 0;
        st.f64 [%out+<4|8>], %d1;""",
        "misaligned access: 8 bytes",
    ),
    "rows of matrices": Fault(
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [memory+<8|16>];",
        "misaligned access: 16 bytes",
        block=32,
    ),
    # Bounds.
    "past the end": Fault(
        "ld.global.b32 %r1, [%in+<72|68>];",
        "out of bounds (the allocation before has 72 bytes, this begins at byte 72): 4 bytes",
    ),
    "across the end": Fault(
        "ld.global.v2.b64 {%d1, %d2}, [%in+<64|48>];",
        "has 72 bytes, this begins at byte 64): 16 bytes",
    ),
    "a store past the end": Fault("st.global.b8 [%out+<64|63>], 0;", "global memory out of bounds"),
    "an atomic past the end": Fault(
        "atom.global.add.u32 %r1, [%out+<64|60>], 1;", "global memory out of bounds"
    ),
    "an acquire past the end": Fault(
        "ld.acquire.gpu.global.u32 %r1, [%out+<64|60>];", "global memory out of bounds"
    ),
    "no address": Fault(
        "ld.global.b32 %r1, [<0|%in>];", "global memory that nobody allocated: 4 bytes at 0x0"
    ),
    "an address of shared memory": Fault(
        "ld.<global|shared>.b32 %r1, [memory];", "global memory that nobody allocated"
    ),
    "past shared memory": Fault(
        "ld.shared.b32 %r1, [memory+<4096|4092>];",
        "shared memory out of bounds (offset): 4 bytes at 0x1000",
    ),
    "before shared memory": Fault(
        "st.shared.b32 [memory+<-4|0>], 0;", "shared memory out of bounds (offset)"
    ),
    "past dynamic memory": Fault(
        "st.shared.b32 [dynamic+<64|60>], 0;",
        "shared memory out of bounds (offset): 4 bytes at 0x1040",
        shared=64,
    ),
    "no dynamic memory": Fault(
        "st.shared.b32 [<dynamic|memory>], 0;", "shared memory out of bounds (offset)"
    ),
    "past shared memory by a generic address": Fault(
        """mov.u64 %d2, memory; cvta.shared.u64 %d1, %d2;
        ld.f32 %r1, [%d1+<4096|4092>];""",
        "global memory",
    ),
    "past the parameters": Fault(
        "ld.param.u64 %d1, [inputs+<16|8>];", "parameters out of bounds (offset): 8 bytes at 0x10"
    ),
    "no shared memory": Fault(
        "cvta.to.<shared|global>.u64 %d1, %in;", "not an address of shared memory"
    ),
    "rows past shared memory": Fault(
        """mov.u32 %r1, 0;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [memory+<4096|4080>], {%r1};""",
        "shared memory out of bounds",
        block=32,
    ),
    # Memory that nobody wrote.
    "an unwritten word": Fault(
        "<ld.global.b32 %r1, [%in+8];|ld.relaxed.gpu.global.u32 %r1, [%in+8];>",
        "global memory that nobody wrote: 4 bytes",
        inputs=FRESH,
    ),
    "an unwritten byte": Fault(
        "<ld.global.u8 %r1, [%in+8];|>", "global memory that nobody wrote: 1 bytes", inputs=FRESH
    ),
    "an unwritten byte at an odd address": Fault(
        "<ld.global.u8 %r1, [%in+9];|>", "global memory that nobody wrote: 1 bytes", inputs=FRESH
    ),
    "an unwritten half": Fault(
        "<ld.global.u16 %r1, [%in+2];|st.global.u16 [%in+2], 0;>",
        "global memory that nobody wrote: 2 bytes",
        inputs=FRESH,
    ),
    "an unwritten double": Fault(
        """<ld.global.f64 %d1, [%in+8]|st.global.f64 [%in+8], %in>;
        ld.global.f64 %d1, [%in+8];""",
        "global memory that nobody wrote: 8 bytes",
        inputs=FRESH,
    ),
    "one of four": Fault(
        "ld.global.<v4.b32 {%r1, %r2, %r3, %r4}|v2.b32 {%r1, %r2}>, [%in];",
        "global memory that nobody wrote: 4 bytes",
        inputs="01" * 12 + FRESH,
    ),
    # A byte alone says too little.
    "an unwritten pair of bytes": Fault(
        "ld.global.<u16 %r1, [%in]|u8 %r1, [%in+3]>;",
        "global memory that nobody wrote",
        inputs="a5ff00ff",
    ),
    # Asynchronous copies.
    "a copy of what nobody wrote": Fault(
        "<cp.async.cg.shared.global [memory], [%in], 16;|> cp.async.wait_all;",
        "a copy of global memory that nobody wrote: 4 bytes",
        inputs="01" * 12 + FRESH,
    ),
    "no wait": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16;
        <|cp.async.wait_all;>
        ld.shared.b32 %r1, [memory+12];""",
        "shared memory that waits for an asynchronous copy",
    ),
    "no wait before a byte": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16;
        ld.shared.u8 %r1, [memory+<15|16>];""",
        "shared memory that waits for an asynchronous copy: 1 bytes",
    ),
    "two copies to one place": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16;
        cp.async.ca.shared.global [memory+<12|16>], [%in], 4;
        cp.async.wait_all;""",
        "two asynchronous copies to one place: 4 bytes",
    ),
    "a wait without a group": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16;
        <|cp.async.commit_group;> cp.async.wait_group 0;
        ld.shared.b32 %r1, [memory];""",
        "shared memory that waits",
    ),
    "a wait that leaves the group": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16; cp.async.commit_group;
        cp.async.wait_group <1|0>;
        ld.shared.b32 %r1, [memory];""",
        "shared memory that waits",
    ),
    "a wait for one group of two": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16; cp.async.commit_group;
        cp.async.ca.shared.global [memory+16], [%in], 4; cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r1, [memory+<16|0>];""",
        "shared memory that waits",
    ),
    "a store below a copy": Fault(
        """cp.async.cg.shared.global [memory], [%in], 16;
        st.shared.b8 [memory+<3|16>], 0;""",
        "a store to what an asynchronous copy will write",
    ),
    "a matrix that waits": Fault(
        """mov.u32 %r2, memory; mad.lo.s32 %r2, %thread, 16, %r2;
        cp.async.cg.shared.global [%r2], [%in], 16;
        <|cp.async.wait_all;>
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];""",
        "shared memory that waits",
        block=32,
    ),
    "a copy to half a word": Fault(
        "cp.async.ca.shared.global [memory+<2|4>], [%in], 4;", "misaligned access: 4 bytes"
    ),
    "a copy from half of 16 bytes": Fault(
        "cp.async.ca.shared.global [memory], [%in+8], <16|8>;", "misaligned access: 16 bytes"
    ),
    "a copy of 12 bytes": Fault(
        "cp.async.ca.shared.global [memory], [%in], <12|8>;", "cp.async of so many bytes"
    ),
    "8 bytes past the first cache": Fault(
        "cp.async.<cg|ca>.shared.global [memory], [%in], 8;", "cp.async of so many bytes"
    ),
    "more than is copied": Fault(
        "cp.async.ca.shared.global [memory], [%in], 8, <9|8>;",
        "cp.async of more bytes than it writes",
    ),
    "a copy past the end": Fault(
        "cp.async.cg.shared.global [memory], [%in+64], 16, <9|8>;", "global memory out of bounds"
    ),
    "a copy past shared memory": Fault(
        "cp.async.cg.shared.global [memory+<4096|4080>], [0], 16, 0;", "shared memory out of bounds"
    ),
    # Barriers and warps.
    "two barriers": Fault(
        ODD
        + """
        <@%p1 bra OTHER; bar.sync 0; bra END;
        OTHER:|> bar.sync 0; END:""",
        "divergent __syncthreads: threads wait at two lines",
        block=32,
    ),
    "a thread ends": Fault(
        ODD
        + """
        <@%p1 ret;|>
        bar.sync 0;""",
        "__syncthreads",
        block=32,
    ),
    "another barrier": Fault("bar.sync <1|0>;", "a barrier other than 0"),
    "a lane outside its mask": Fault(
        "bar.warp.sync <0x55555555|0xFFFFFFFF>;",
        "a lane is absent from the mask of its own warp operation",
        block=32,
    ),
    "a shuffle by a lane outside its mask": Fault(
        "shfl.sync.idx.b32 %r1, %thread, 0, 31, <0xFFFF|-1>;",
        "a lane is absent from the mask",
        block=32,
    ),
    "masks that differ": Fault(
        ODD
        + """
        selp.b32 %r2, 0xFFFFFFFF, <0x55555557|0xFFFFFFFF>, %p1;
        vote.sync.ballot.b32 %r3, %p1, %r2;""",
        "the masks of a warp operation differ between lanes",
        block=32,
    ),
    "two operations meet": Fault(
        ODD
        + """
        <@%p1 bra OTHER; bar.warp.sync -1; ret;|>
        OTHER: vote.sync.ballot.b32 %r1, %p1, -1;""",
        "lanes of one warp meet in different operations",
        block=32,
    ),
    "lanes miss the matrices": Fault(
        """and.b32 %r1, %thread, 1; setp.eq.u32 %p1, %r1, 1; mov.u32 %r4, 0;
        <@%p1 ret;|>
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r5, %r6, %r7, %r8},
          {%r4, %r4, %r4, %r4}, {%r4, %r4}, {%r4, %r4, %r4, %r4};""",
        "a multiplication of matrices without all lanes of the warp",
        block=32,
    ),
    "half a warp loads matrices": Fault(
        """and.b32 %r1, %thread, 1; setp.eq.u32 %p1, %r1, <1|2>;
        @%p1 bra WAIT; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [memory];
        WAIT: bar.sync 0;""",
        "dead-lock: every thread waits",
        block=32,
    ),
    # Progress.
    "a loop without an end": Fault(
        "FOR_EVER:< bra FOR_EVER;|>", "a thread runs for ever", settings=SPINS
    ),
    "a flag that nobody sets": Fault(
        """<|st.relaxed.gpu.global.u32 [%out], 1;>
        POLL: nanosleep.u32 20; ld.acquire.gpu.global.u32 %r1, [%out];
        setp.eq.u32 %p1, %r1, 0; @%p1 bra POLL;""",
        "dead-lock: threads poll, and nothing that they could wait for changes",
        settings=SPINS,
    ),
    "a poll that lets nobody run": Fault(
        """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;
        @%p1 st.release.gpu.global.u32 [%out], 1; @%p1 ret;
        POLL:<| nanosleep.u32 20;>
        ld.global.b32 %r1, [%out]; setp.eq.u32 %p1, %r1, 0; @%p1 bra POLL;""",
        "a thread runs for ever",
        grid=2,
        settings=SPINS | {"EMULATION_SHUFFLE": "0"},
    ),
    "past the last instruction": Fault(
        """setp.ne.u32 %p1, %thread, %thread;
        <bra PAST;|>
        ret; PAST: @%p1 bra PAST; mov.u32 %r1, 0; }  .entry rest() {""",
        "a thread ran past the last instruction",
    ),
}

# Runs the kernels that it is given, one after the other.
PROCESS = """
import json, os, sys
import ptx_kernels
from emulation.ptx import machine
for name, text, settings, inputs, block, grid, shared in json.load(sys.stdin):
    print(name, flush=True)
    os.environ.update(settings)
    machine.load(text)
    ptx_kernels.run("planted", bytes.fromhex(inputs), bytes(64), block, grid, shared)
"""


def run_apart(*faults: str, mistake: bool) -> subprocess.CompletedProcess[str]:
    work = [
        (name, f.text(mistake), f.settings, f.inputs, f.block, f.grid, f.shared)
        for name, f in ((name, FAULTS[name]) for name in faults)
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROCESS]
    return subprocess.run(command, input=json.dumps(work), env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_reported(name: str) -> None:
    """With what is wrong, the kernel, and a line of it: that of the mistake, or one behind it."""
    fault = FAULTS[name]
    done = run_apart(name, mistake=True)
    assert done.returncode == 99, done.stderr or "the mistake went unnoticed"
    assert fault.message in done.stderr, done.stderr
    assert any(f"planted:{line}\n" in done.stderr for line in fault.lines()), done.stderr


def test_right_kernels_pass() -> None:
    done = run_apart(*FAULTS, mistake=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {done.stderr}"
    assert done.stdout.splitlines() == list(FAULTS)


@pytest.mark.parametrize("what", ["mov.b32 %r1, %r9;", "ld.shared.b32 %r1, [memory+64];"])
def test_poison_shows_in_what_nobody_wrote(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers and shared memory: only a kernel that reads them depends on the poison."""
    written = "mov.b32 %r9, 5; st.shared.b32 [memory+64], 5;"
    for before, same in ((written, True), ("", False)):
        machine.load(
            HEADER + ptx_kernels.entry("poisoned", f"{before} {what} st.global.b32 [%out], %r1;")
        )
        outs = []
        for poison in ("255", "60"):
            monkeypatch.setenv("EMULATION_POISON", poison)
            outs.append(ptx_kernels.run("poisoned", bytes(8), 4))
        assert (outs[0] == outs[1]) == same
        assert same or outs == [b"\xff" * 4, b"\x3c" * 4]


@pytest.mark.parametrize("value", [0xA5, 0xFF])
def test_a_byte_may_look_like_one_that_nobody_wrote(value: int) -> None:
    body = "ld.global.u8 %r1, [%in+%d]; st.global.b32 [%out], %r1;"
    for at in (0, 1):
        machine.load(HEADER + ptx_kernels.entry("a_byte", body.replace("%d", str(at))))
        assert words(ptx_kernels.run("a_byte", bytes([value] * 8), 4)) == [value]


def test_memory_that_was_freed_is_out_of_bounds() -> None:
    code = """
import ctypes, ptx_kernels
from emulation.ptx import machine
machine.load(ptx_kernels.HEADER + ptx_kernels.entry("late", "ld.global.b32 %r1, [%in];"))
memory, other = ptx_kernels.Memory(bytes(64)), ptx_kernels.Memory(bytes(64))
values = [ctypes.c_uint64(memory.address), ctypes.c_uint64(other.address)]
machine.launch("late", (1,), (1,), 0, values)
memory.free()
print("once", flush=True)
machine.launch("late", (1,), (1,), 0, values)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("once\n", 99) and "global memory" in done.stderr


def test_a_multiplication_may_write_over_its_addends() -> None:
    """d and c in other orders of the same registers."""
    zeros = "{%r9, %r9, %r9, %r9}, {%r9, %r9}"
    body = f"""mov.u32 %r9, 0; mov.f32 %r0, 0f3F800000; mov.f32 %r1, 0f40000000;
        mov.f32 %r2, 0f40400000; mov.f32 %r3, 0f40800000;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r1, %r2, %r3, %r0}}, {zeros},
          {{%r0, %r1, %r2, %r3}};
        mad.wide.u32 %d1, %thread, 16, %out; st.global.v4.b32 [%d1], {{%r1, %r2, %r3, %r0}};"""
    machine.load(HEADER + ptx_kernels.entry("in_place", body))
    out = np.frombuffer(ptx_kernels.run("in_place", bytes(8), 512, block=32), np.float32)
    assert (out.reshape(32, 4) == [1, 2, 3, 4]).all()
