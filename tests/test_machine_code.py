"""The facts of machine code, and that each is noticed where it is broken. Needs no nvcc.

The kernel below calls what cuda/device.h has, once each. Its PTX and its machine code are as nvcc
13.0 and nvdisasm gave them for sm_90, without most of the arithmetic of addresses.
"""

from __future__ import annotations

import pytest

from bench.estimates.machine_code import code_of
from tests.budgets.ptxas import FACTS, facts_of, faults_of, ptx_of

NAME = "_ZN5msrnn3gpu11step_kernelINS_8BFloat16ELi1EEEvNS0_8StepCallE"
PTX = f"""
.visible .entry {NAME}(
.param .align 8 .b8 {NAME}_param_0[40]
)
{{
.reg .pred %p<7>;

ld.param.u32 %r5, [{NAME}_param_0+32];
setp.eq.s32 %p1, %r5, 0;
@%p1 bra $L__BB0_7;

cp.async.cg.shared.global [%r6], [%rd6], 16;
cp.async.wait_all;
bar.sync 0;
ld.acquire.gpu.global.u32 %r7, [%rd7];
setp.ne.s32 %p2, %r7, 0;
@%p2 bra $L__BB0_4;

$L__BB0_3:
mov.u32 %r11, 32;
nanosleep.u32 %r11;
ld.acquire.gpu.global.u32 %r12, [%rd3];
setp.eq.s32 %p3, %r12, 0;
@%p3 bra $L__BB0_3;

$L__BB0_4:
vote.sync.all.pred %p5, %p4, %r21;
bar.warp.sync -1;
ld.shared.v4.u32 {{%r27, %r28, %r29, %r30}}, [%r26];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f1, %f2, %f3, %f4}}, {{%r27, %r28, %r29, \
%r30}}, {{%r27, %r28}}, {{%f1, %f2, %f3, %f4}};
ld.global.cg.f32 %f9, [%rd11];
ex2.approx.ftz.f32 %f10, %f1;
fma.rn.f32 %f12, %f9, %f10, %f2;
mul.rn.f32 %f13, %f3, %f4;
add.rn.f32 %f14, %f12, %f13;
st.global.f32 [%rd15], %f14;
not.pred %p6, %p5;
@%p6 bra $L__BB0_6;

st.global.v4.u32 [%rd19], {{%r27, %r28, %r29, %r30}};

$L__BB0_6:
mov.u32 %r31, 1;
st.release.gpu.global.u32 [%rd20], %r31;

$L__BB0_7:
ret;

}}
"""
MACHINE_CODE = f"""
	.section	.text.{NAME},"ax",@progbits
{NAME}:
.text.{NAME}:
        /*0010*/                   ULDC UR8, c[0x0][0x230] ;
        /*0020*/                   ISETP.NE.AND P0, PT, RZ, UR8, PT ;
.L_x_5:
        /*0030*/              @!P0 EXIT ;
        /*0100*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR6][R2.64] ;
        /*0110*/                   LDGDEPBAR ;
        /*0120*/                   DEPBAR.LE SB0, 0x0 ;
        /*0130*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0140*/                   LDG.E.STRONG.GPU R6, desc[UR6][R4.64] ;
        /*0150*/                   CCTL.IVALL ;
        /*0160*/                   ISETP.NE.AND P0, PT, R6, RZ, PT ;
        /*0170*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0180*/                   NANOSLEEP 0x20 ;
        /*0190*/                   LDG.E.STRONG.GPU R2, desc[UR6][R4.64] ;
        /*01a0*/                   CCTL.IVALL ;
        /*01b0*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*01c0*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0200*/                   LEA.HI.X R3, R0, UR11, R17, 0x2, P0 ;
.L_x_3:
        /*0210*/                   NOP ;
        /*0220*/                   LDG.E.STRONG.GPU R16, desc[UR6][R2.64] ;
        /*0270*/                   LDS.128 R4, [R4+UR4] ;
.L_x_4:
        /*0280*/                   VOTE.ALL P0, !P0 ;
        /*02a0*/                   HMMA.16816.F32.BF16 R8, R4, R4, RZ ;
        /*02d0*/                   NOP ;
        /*02e0*/                   MUFU.EX2 R8, R8 ;
        /*02f0*/                   FMUL R10, R10, R11 ;
        /*0310*/                   FFMA R9, R16, R8, R9 ;
        /*0320*/                   FADD R9, R9, R10 ;
        /*0330*/                   STG.E desc[UR6][R2.64], R9 ;
        /*0340*/               @P0 STG.E.128 desc[UR6][R12.64], R4 ;
        /*0390*/                   MEMBAR.ALL.GPU ;
        /*03a0*/                   ERRBAR;
        /*03b0*/                   CGAERRBAR ;
        /*03c0*/                   STG.E.STRONG.GPU desc[UR6][R14.64+0x4], R11 ;
.L_x_6:
        /*03d0*/                   EXIT ;
.L_x_2:
        /*03e0*/                   BRA `(.L_x_2);
        /*03f0*/                   NOP;
        /*0400*/                   NOP;
.L_x_7:
"""
COUNTS = {
    **dict.fromkeys(FACTS, "0"),
    **dict.fromkeys(("barriers", "warp_barriers", "releases", "copies", "copies_done"), "1"),
    **dict.fromkeys(("stores", "shared_loads", "mma_bfloat16", "exp2"), "1"),
    **dict.fromkeys(("adds", "multiplies", "fused"), "1"),
    "acquires": "2",
    "coherent_loads": "3",
    "exits": "2",
}


def facts_and_faults(ptx: str, machine_code: str) -> tuple[dict[str, str], list[str]]:
    (before,), (after,) = ptx_of(ptx).values(), code_of(machine_code).values()
    return facts_of(before, after), faults_of(after)


def test_machine_code_has_what_ptx_has() -> None:
    assert facts_and_faults(PTX, MACHINE_CODE) == (COUNTS, [])


BROKEN = {  # by name: what is replaced and by what; the facts that change; the faults that arise
    "a barrier is lost": ("BAR.SYNC.DEFER_BLOCKING 0x0", "MOV R1, R1", {"barriers": "1-1"}, []),
    "a warp does not meet": (
        "NOP ;\n        /*0220",
        "YIELD ;\n /*0220",
        {"warp_barriers": "1-1"},
        [],
    ),
    "a cache is not dropped": ("/*0150*/ CCTL.IVALL", "/*0150*/ YIELD", {"acquires": "2-1"}, []),
    "a load may be stale": (
        "LDG.E.STRONG.GPU R16",
        "LDG.E R16",
        {"coherent_loads": "3-1"},
        [],
    ),
    "a cache is dropped too late": (
        "/*0140*/ LDG.E.STRONG.GPU R6",
        "/*0140*/ LDG.E R6",
        {"coherent_loads": "3-1"},
        ["CCTL.IVALL: an acquire without its load"],
    ),
    "a release has no fence": (
        "MEMBAR.ALL.GPU",
        "YIELD",
        {"releases": "1-1"},
        ["STG.E.STRONG.GPU desc[UR6][R14.64+0x4], R11: a release without its fence"],
    ),
    "a store passes the fence": (
        "CGAERRBAR",
        "STG.E desc[UR6][R2.64], R9",
        {},
        ["STG.E.STRONG.GPU desc[UR6][R14.64+0x4], R11: a release without its fence"],
    ),
    "a copy goes through the cache": ("LDGSTS.E.BYPASS.128", "LDGSTS.E.128", {"copies": "1-1"}, []),
    "copies are not awaited": ("SB0, 0x0", "SB0, 0x1", {"copies_done": "1-1"}, []),
    "a store is narrow": ("STG.E.128", "STG.E.64", {"stores": "1-1"}, []),
    "a load from shared memory is narrow": ("LDS.128", "LDS.64", {"shared_loads": "1-1"}, []),
    "a product has another shape": (
        "HMMA.16816.F32.BF16",
        "HMMA.1688.F32.BF16",
        {"mma_bfloat16": "1-1"},
        ["HMMA.1688.F32.BF16 R8, R4, R4, RZ: another shape or type than the source has"],
    ),
    "a product has another type": (
        "HMMA.16816.F32.BF16",
        "HMMA.16816.F32",
        {"mma_bfloat16": "1-1", "mma_float16": "0+1"},
        [],
    ),
    "an exponential is gone": ("MUFU.EX2 R8, R8", "MOV R8, R8", {"exp2": "1-1"}, []),
    "another special function": ("MUFU.EX2", "MUFU.LG2", {"exp2": "1-1", "log2": "0+1"}, []),
    "what is separate is fused": (
        "FMUL R10, R10, R11 ;\n        /*0310*/                   FFMA R9, R16, R8, R9 ;\n"
        "        /*0320*/                   FADD R9, R9, R10",
        "FFMA R9, R16, R8, R9 ;\n /*0310*/ FFMA R9, R10, R11, R9",
        {"adds": "1-1", "multiplies": "1-1", "fused": "1+1"},
        [],
    ),
    "a register is spilled": (
        "ULDC UR8, c[0x0][0x230]",
        "STL [R1], R4",
        {},
        ["1 accesses of local memory"],
    ),
    "an exit too many": ("LEA.HI.X R3", "@P3 EXIT ;\n /*0200*/ LEA.HI.X R3", {"exits": "2+1"}, []),
    "an exit where code went on": (
        "/*0280*/ VOTE.ALL P0, !P0",
        "/*0280*/ EXIT",
        {"exits": "2+1"},
        ["HMMA.16816.F32.BF16 R8, R4, R4, RZ: is never reached"],
    ),
    "a branch to nowhere": (
        "@P0 BRA `(.L_x_0)",
        "@P0 BRA `(.L_x_9)",
        {},
        ["@P0 BRA `(.L_x_9): leads out of the kernel"],
    ),
    "a branch behind the end": (
        "@P0 BRA `(.L_x_0)",
        "@P0 BRA `(.L_x_7)",
        {},
        ["@P0 BRA `(.L_x_7): leads out of the kernel"],
    ),
    "a branch by a register": (
        "@P0 BRA `(.L_x_0)",
        "@P0 BRX R2 -0x10",
        {},
        ["@P0 BRX R2 -0x10: leads nowhere that can be told"],
    ),
    "a call": (
        "@P0 BRA `(.L_x_0)",
        "CALL.REL.NOINC `($_Z4exp2f)",
        {},
        [
            "CALL.REL.NOINC `($_Z4exp2f): leads out of the kernel",
            "CALL.REL.NOINC `($_Z4exp2f): calls what was not inlined",
        ],
    ),
    "a poll that does not end": (
        "@!P0 BRA `(.L_x_1)",
        "BRA `(.L_x_1)",
        {},
        ["NANOSLEEP 0x20: leads to no end"],
    ),
    "no end": (
        "EXIT ;\n.L_x_2:\n        /*03e0*/                   BRA `(.L_x_2)",
        "YIELD ;\n.L_x_2:\n /*03e0*/ YIELD",
        {"exits": "2-1"},
        [
            "YIELD: runs on beyond the end",
            "LDGSTS.E.BYPASS.128 [R7], desc[UR6][R2.64]: leads to no end",
        ],
    ),
}


def spaced(text: str) -> str:
    """With as many blanks behind an address as nvdisasm prints."""
    return text.replace("*/ ", "*/" + 19 * " ") if text.startswith("/*") else text


@pytest.mark.parametrize("name", BROKEN)
def test_broken_machine_code_is_noticed(name: str) -> None:
    old, new, facts, faults = BROKEN[name]
    assert MACHINE_CODE.count(spaced(old)) == 1
    found = facts_and_faults(PTX, MACHINE_CODE.replace(spaced(old), new))
    assert found == ({**COUNTS, **facts}, faults)


def test_ptx_that_asks_for_less_is_noticed() -> None:
    """The counts are of both sides, so a table notices a source that lost what it had."""
    relaxed = PTX.replace("ld.acquire.gpu", "ld.relaxed.gpu")
    facts, _ = facts_and_faults(relaxed, MACHINE_CODE.replace("CCTL.IVALL", "YIELD"))
    assert facts == {**COUNTS, "acquires": "0"}
