"""An estimate of the CUDA scans from their machine code: ``python -m bench estimates scans``.

A scan does as well as it can when it takes as long as a copy of the bytes it must move. This counts
what else an element costs a multiprocessor and says which share of a copy's bandwidth that leaves:
the time of the copy over that of whatever takes longest of

  memory   the bytes read and written once, at the bandwidth of a copy; for the look-back column
           also the spans and carries that blocks exchange, as if no cache held them
  issue    instructions, 128 a clock (4 warps of 32 threads)
  fma      floating-point adds and multiplications, 128 a clock (64 on sm_80), and IMAD
  alu      comparisons, selections, logic, integers and conversions, 64 a clock
  special  exponentials, logarithms and reciprocals, 16 a clock
  shared   wavefronts of 128 bytes to and from shared memory and L1, one a clock

The instructions are those of the hot path. Branches that a wide, long, unpacked call never takes
(unaligned views, sequence marks, partial tiles, infinite decays, and look-back, which one warp runs
while the others wait) become traps in a copy of the source: their tests count, their bodies do not.
Marks in the machine code (`pmevent`) bracket what some warps run alone or several times, and give
its weight: the fold over a tile's parts is the work of one warp of 8 (backward of 4), 8 rounds of
it.

Not in it: latency and how much of it other warps hide, barriers, bank conflicts, the first and last
tiles and waves. So it says what a kernel cannot beat, not what it reaches.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.table import Table

from .machine_code import DTYPES, OPS, PASSES, ROOT, Code, disassemble, opcode, output_of, tool

Counts = defaultdict[str, float]  # of instructions, by name


@dataclass(frozen=True)
class Machine:
    """A GPU: multiprocessors and boost clock as published, and how fast it copies."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s, read and written, of a copy
    source: str
    fma: int = 128  # floating-point additions or multiplications a clock and multiprocessor


_NOMINAL = 0.9  # of the published bandwidth is what a copy reaches
MACHINES = (
    Machine("A100 40GB", "80", 108, 1.41e9, _NOMINAL * 1.555e12, "NVIDIA A100 datasheet", 64),
    Machine("A100 80GB", "80", 108, 1.41e9, _NOMINAL * 2.039e12, "NVIDIA A100 datasheet", 64),
    Machine("H100 SXM", "90", 132, 1.98e9, _NOMINAL * 3.35e12, "NVIDIA H100 datasheet"),
    Machine("H200 SXM", "90", 132, 1.98e9, 4.3e12, "NVIDIA H200 datasheet; copy measured"),
    Machine("B200", "100", 148, 1.85e9, _NOMINAL * 8e12, "NVIDIA DGX B200 datasheet"),
    Machine("RTX 5090", "120", 170, 2.41e9, _NOMINAL * 1.79e12, "NVIDIA RTX Blackwell whitepaper"),
)


SHOWN = ("linear_scan", "decay_scan", "log_scan", "min_gru", "min_lstm")


# What is inserted, in «», into a copy of scan.cuh, and how often the rest is found there: traps at
# rare branches, the trip counts of a long call, marks around what some warps run, or several times.
INSERTIONS = {
    "«MSRNN_FN void rare() { __trap(); __builtin_unreachable(); }\n"
    'template <int n> MSRNN_FN void note() { asm volatile("pmevent %0;" ::"n"(n)); }\n»'
    "// The sequences as a tile walks": 1,  # in sequences.h
    # Packed sequences and resets, no gradient of h, unaligned views, the end of the sequence.
    "  «rare(); »uint32_t uncovered = 0, resets = 0;": 1,
    "b.adjoint[c] = «true || »call.grad_state.data": 1,
    "!v.data) «{ rare(); } else if (false) »continue;": 1,
    "} else {\n«rare();\n»#pragma unroll 1\n        for (int step = 0; step < count;": 1,
    "    «rare(); »memcpy(staged(), &chunk,": 1,
    "if (s >= count_of(t)) «{ rare(); } else if (false) »break;": 3,
    # The first and the last step of a sequence.
    "if (here.starts(s)) {\n«rare();\n»        State": 1,
    "if (here.starts(s)) «rare(), »enter_sequence(t, mark, s, state);": 1,
    "«rare(), »leave_sequence(t, mark, s, state);": 1,
    "if (mark.alone(step))\n«rare(), »": 1,
    "if (mark.any_uncovered()) «rare(), »": 1,
    # Products that vanish, decays that are infinite, the exchange between blocks.
    "«rare(), »clamp(span, before, own);": 1,
    "if (serial) {\n«rare();\n»": 1,
    "if (call.plan.look_back) { «rare(); » // at most 32": 1,
    # The rows of a part; part by part; the parts of a tile; the tile; the next tile's draw.
    "r < «8 + 0 * »part_rows();": 4,
    "} else {\n«rare();\n»#pragma unroll 1\n        for (int r": 2,
    "      «note<2>();\n»const int part = i": 1,
    "warp_starts()[first / 32] >> first % 32);\n«note<3>();\n»": 1,
    "«note<4>();\n»      const Span total = fold_parts(channel, starts);": 1,
    "carry()[channel] = carry_after<Space>(c, total, starts);\n«note<5>();\n»": 1,
    "«note<6>();\n»      S* const at = part_words(part) + channel;": 1,
    "      starts = starts || own_starts;\n«note<7>();\n»": 1,
    "if (draws) «{ note<8>(); »drawn = draw_after(tile(turn + 1));« note<9>(); }»": 1,
    "if (draws) «{ note<8>(); »tile(turn + 2) = tile_at(drawn);« note<9>(); }»": 1,
    "++turn) «{ note<0>(); »run(turn);« note<1>(); }»": 1,
}

CUT = "\0"  # between files

# Opcodes by what runs them.
PIPES = {
    "fma": "FADD FADD2 FFMA FFMA2 FMUL FMUL2 HADD2 HFMA2 HMUL2 IMAD",
    "alu": "BMSK F2FP FCHK FLO FMNMX FMNMX3 FSEL FSET FSETP I2FP IABS IADD IADD3 ISETP LEA LOP3 "
    "MOV P2R PLOP3 POPC PRMT R2P SEL SGXT SHF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE",
    "special": "MUFU I2F F2I F2F FRND",
}
SHARED = ("LDS", "STS", "LDGSTS", "LDG", "STG")


@dataclass(frozen=True)
class Cost:
    """What an element costs, in threads of an instruction; shared memory in wavefronts."""

    issue: float
    fma: float
    alu: float
    special: float
    shared: float
    mix: dict[str, float]


def blocks_of(lines: Sequence[str]) -> Iterator[list[str]]:
    """Basic blocks, in the order of their addresses."""
    block: list[str] = []
    for line in lines:
        if line.endswith(":"):
            yield block
            block = []
            continue
        block.append(line)
        if opcode(line).split(".")[0] in ("BRA", "EXIT"):
            yield block
            block = []
    yield block


def weights_of(backward: bool, vector: int) -> dict[int, float]:
    """How often a warp runs each marked region, on average over the warps of a block."""
    warps, lanes, parts = (4 if backward else 8), 4, 8
    threads, channels = 32 * warps, lanes * vector
    return {
        0: 1,  # a tile
        2: channels * parts / threads,  # the rows of a part, for one channel
        4: 1 / warps,  # the parts of a tile
        6: parts,  # each of them
        8: 1 / warps,  # drawing a tile
    }


def weighted(lines: Sequence[str], weights: dict[int, float]) -> Counts:
    """Instructions of a thread and tile by name, marks left out.

    A mark weighs its whole basic block, in which the compiler may have moved it.
    """
    total: Counts = defaultdict(float)
    within: list[int] = []
    for block in blocks_of(lines):
        marks = [int(line.split()[-1], 0) for line in block if opcode(line) == "PMTRIG"]
        marks = [mark.bit_length() - 1 for mark in marks]
        within += [mark for mark in marks if mark % 2 == 0]
        if within:
            weight = 1.0
            for mark in within:
                weight *= weights[mark]
            for line in block:
                total[opcode(line)] += weight
        for mark in marks:
            if mark % 2:
                within.remove(mark - 1)
    assert not within, within
    total.pop("PMTRIG")
    return total


def hot_source(source: Path, folder: Path) -> None:
    """A copy of the sources whose kernel has only its hot path, with marks."""
    shutil.copytree(source, folder / "csrc")
    paths = [folder / "csrc/cuda" / name for name in ("sequences.h", "scan_tile.h", "scan.cuh")]
    text = CUT.join(path.read_text() for path in paths)
    for insertion, count in INSERTIONS.items():
        old, new = re.sub("«[^»]*»", "", insertion), re.sub("[«»]", "", insertion)
        if text.count(old) != count:
            sys.exit(f"{text.count(old)} times in the kernel, expected {count}: {old}")
        text = text.replace(old, new)
    for path, part in zip(paths, text.split(CUT), strict=True):
        path.write_text(part)


def compile_kernels(folder: Path, dtype: str, arch: str, ops: Sequence[str]) -> Code:
    """The hot paths of both passes of these ops."""
    lines = ['#include "csrc/cuda/scan.cuh"', "namespace msrnn::gpu {"]
    for op, backward in product(ops, ("false", "true")):
        kernel = f"scan_kernel<{OPS[op].kind}, {DTYPES[dtype].kind}, {backward}>"
        lines.append(f"template __global__ void {kernel}(const __grid_constant__ ScanCall);")
    path = folder / f"{dtype}_{arch}.cu"
    path.write_text("\n".join([*lines, "}"]))
    cubin = path.with_suffix(".cubin")
    options = ("-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", str(path), "-o", str(cubin))
    output_of(tool("nvcc"), *options)
    return disassemble(cubin)


def wavefronts(name: str) -> int:
    """Of 128 bytes, for a warp."""
    base, *suffixes = name.split(".")
    if base not in SHARED:
        return 0
    return 4 if "128" in suffixes else 2 if "64" in suffixes else 1


def cost_of(lines: Sequence[str], op: str, dtype: str, which: str) -> Cost:
    """Of an element: what a thread does for a tile, over its elements."""
    vector = 16 // DTYPES[dtype].size
    counts = weighted(lines, weights_of(which == "backward", vector))
    bases: Counts = defaultdict(float)
    for name, n in counts.items():
        bases[name.split(".")[0]] += n

    # Else what was cut or marked is not what it was thought to be.
    reads, writes = OPS[op].tensors[which]
    assert (bases["LDGSTS"], bases["STG"], bases["BAR"]) == (4 * reads, 4 * writes, 4), bases

    elements = 4 * vector
    pipes = {pipe: sum(bases[n] for n in PIPES[pipe].split()) / elements for pipe in PIPES}
    shared = sum(wavefronts(name) * n for name, n in counts.items()) / elements
    mix = {
        name: round(n / elements, 2)
        for name, n in sorted(bases.items(), key=lambda item: -item[1])[:24]
    }
    return Cost(issue=sum(bases.values()) / elements, shared=shared, mix=mix, **pipes)


def exchanged(which: str) -> float:
    """Bytes an element that blocks exchange through memory in look-back.

    A tile writes its span, 3 words a channel, and reads on average half a group's and a carry of 2
    words; the last of a group writes one.
    """
    group, steps = 16, 128 if which == "backward" else 256
    span, carry = 3 * 4, 2 * 4
    return (span + (group - 1) / 2 * span + carry + carry / group) / steps


def estimate(machine: Machine, cost: Cost, traffic: float, exchange: float) -> dict[str, Any]:
    """Seconds of an element on the whole GPU, and what share of a copy's bandwidth that is."""
    clocks = machine.multiprocessors * machine.clock
    rates = {"issue": 128, "fma": machine.fma, "alu": 64, "special": 16, "shared": 32}
    copy = traffic / machine.bandwidth
    times = {name: getattr(cost, name) / rate / clocks for name, rate in rates.items()}
    shares = {}
    for path, moved in (("walk", traffic), ("look_back", traffic + exchange)):
        taken = {"memory": moved / machine.bandwidth, **times}
        limit = max(taken, key=lambda name: taken[name])
        shares[path] = {"share": copy / taken[limit], "limit": limit}
    return {"copy": copy, **times, **shares}


def measure(archs: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each op, dtype, pass and architecture."""
    dtypes, ops = ("bfloat16", "float32"), SHOWN
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        hot_source(ROOT / "csrc", folder)
        jobs = {
            (arch, dtype): pool.submit(compile_kernels, folder, dtype, arch, ops)
            for arch, dtype in product(archs, dtypes)
        }
        code = {key: job.result() for key, job in jobs.items()}
    rows: list[dict[str, Any]] = []
    for arch, op, which, dtype in product(archs, ops, PASSES, dtypes):
        cost = cost_of(code[arch, dtype][f"{op}/{dtype}/{which}"], op, dtype, which)
        traffic, exchange = sum(OPS[op].tensors[which]) * DTYPES[dtype].size, exchanged(which)
        machines = [machine for machine in MACHINES if machine.arch == arch]
        shares = {m.name: estimate(m, cost, traffic, exchange) for m in machines}
        row = {"arch": arch, "op": op, "dtype": dtype, "pass": which, "bytes": traffic}
        rows.append(row | {"exchanged": exchange, "cost": asdict(cost), "machines": shares})
    return rows


def _share(share: dict[str, Any]) -> str:
    """What is left of a copy's bandwidth, and what limits it if that is not memory."""
    return f"{share['share']:.0%}" + ("" if share["limit"] == "memory" else f" {share['limit']}")


def table(rows: Sequence[dict[str, Any]], arch: str) -> Table:
    counts = ("issue", "fma", "alu", "special", "shared")
    machines = [m.name for m in MACHINES if m.arch == arch]
    cells = []
    for row in (row for row in rows if row["arch"] == arch):
        figures = [f"{row['cost'][name]:.2f}" for name in counts]
        shares = [_share(row["machines"][name]["walk"]) for name in machines]
        shares.append(_share(row["machines"][machines[-1]]["look_back"]))
        cells.append([row["op"], row["dtype"], row["pass"], str(row["bytes"]), *figures, *shares])
    note = "Counts per element, then the share of a copy's bandwidth on each GPU."
    columns = ("op", "dtype", "pass", "bytes", *counts, *machines, "look-back")
    return Table(f"Scans, sm_{arch}", note, columns, cells, labels=3)


def run(archs: Sequence[str]) -> tuple[list[dict[str, Any]], list[Table]]:
    rows = measure(archs)
    return rows, [table(rows, arch) for arch in archs]
