"""An estimate of the CUDA scans from their machine code: ``python -m bench.roofline``.

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

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.85  # of a copy's bandwidth


@dataclass(frozen=True)
class Machine:
    """A GPU: multiprocessors and boost clock as published, and how fast it copies."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s, read and written, of a copy
    source: str


_NOMINAL = 0.9  # of the published bandwidth is what a copy reaches
MACHINES = (
    Machine("A100 40GB", "80", 108, 1.41e9, _NOMINAL * 1.555e12, "NVIDIA A100 datasheet"),
    Machine("A100 80GB", "80", 108, 1.41e9, _NOMINAL * 2.039e12, "NVIDIA A100 datasheet"),
    Machine("H100 SXM", "90", 132, 1.98e9, _NOMINAL * 3.35e12, "NVIDIA H100 datasheet"),
    Machine("H200 SXM", "90", 132, 1.98e9, 4.3e12, "NVIDIA H200 datasheet; copy measured"),
    Machine("B200", "100", 148, 1.85e9, _NOMINAL * 8e12, "NVIDIA DGX B200 datasheet"),
    Machine("RTX 5090", "120", 170, 2.41e9, _NOMINAL * 1.79e12, "NVIDIA RTX Blackwell whitepaper"),
)


@dataclass(frozen=True)
class Op:
    """An op: its name in C++, and the tensors of B*T*D that each pass reads and writes."""

    kind: str
    tensors: tuple[tuple[int, int], tuple[int, int]]


OPS = {
    "linear_scan": Op("LinearScan", ((2, 1), (3, 2))),
    "decay_scan": Op("DecayScan", ((2, 1), (3, 2))),
    "log_scan": Op("LogScan", ((2, 1), (4, 2))),
    "min_gru": Op("MinGru<false>", ((2, 1), (4, 2))),
    "min_lstm": Op("MinLstm<false>", ((3, 1), (5, 3))),
}
DTYPES = {"bfloat16": "BFloat16", "float32": "float"}
SIZES = {"bfloat16": 2, "float32": 4}
PASSES = ("forward", "backward")

# From the rare branches to traps, and marks around what runs more or less than once a thread and
# tile. Each text must be in the source as often as is said here.
REPLACEMENTS = (
    (
        "// The sequences as a tile",
        "MSRNN_FN void rare() { __trap(); __builtin_unreachable(); }\n"
        'template <int n> MSRNN_FN void note() { asm volatile("pmevent %0;" ::"n"(n)); }\n'
        "// The sequences as a tile",
        1,
    ),
    ("  int n = m.sequence =", "  rare();\n  int n = m.sequence =", 1),
    ("if (of_grad && !v.data) continue;", "if (of_grad && !v.data) rare();", 1),
    (
        "} else {\n#pragma unroll 1\n        for (int step = 0; step < count;",
        "} else {\nrare();\n#pragma unroll 1\n        for (int step = 0; step < count;",
        1,
    ),
    ("    memcpy(staged(), &chunk,", "    rare();\n    memcpy(staged(), &chunk,", 1),
    ("if (s >= count_of(t)) break;", "if (s >= count_of(t)) rare();", 2),
    (
        "if (mark.starts >> s & 1) {\n        State",
        "if (mark.starts >> s & 1) {\nrare();\n        State",
        1,
    ),
    ("& 1) enter_sequence(t, mark, s, state);", "& 1) rare();", 1),
    ("& 1) leave_sequence(t, mark, s, state);", "& 1) rare();", 1),
    ("      if (mark.ends >> step & 1)\n", "      if (mark.ends >> step & 1) rare(); else if (0)\n", 1),
    ("!ordinary) clamp(span, before, own);", "!ordinary) rare();", 1),
    ("if (call.plan.look_back) {  // at most", "if (call.plan.look_back) { rare();  // at most", 1),
    ("if (serial) {\n", "if (serial) {\nrare();\n", 1),
    ("w < threads() / 32; ++w", "w < (backward ? 4 : 8); ++w", 1),
    ("left = call.plan.rows / parts();", "left = 8;", 2),
    ("#pragma unroll 4\n", "#pragma unroll\n", 2),
    ("turn) {\n", "turn) {\nnote<0>();\n", 1),
    ("      run(turn, drawn);\n", "      run(turn, drawn);\nnote<1>();\n", 1),
    ("      const int part = i / channels()", "note<2>();\n      const int part = i / channels()", 1),
    ("warp_starts()[first / 32] >> first % 32);\n", "warp_starts()[first / 32] >> first % 32);\nnote<3>();\n", 1),
    ("      const Span total = fold_parts(channel,", "note<4>();\n      const Span total = fold_parts(channel,", 1),
    ("carry()[channel] = carry_after(c, total, starts);\n", "carry()[channel] = carry_after(c, total, starts);\nnote<5>();\n", 1),
    ("      S* const at = part_words(part) + channel;\n", "note<6>();\n      S* const at = part_words(part) + channel;\n", 1),
    ("      starts = starts || own_starts;\n", "      starts = starts || own_starts;\nnote<7>();\n", 1),
    ("if (threadIdx.x == 0) tile(turn + 2) = tile_at(drawn);", "if (threadIdx.x == 0) { note<8>(); tile(turn + 2) = tile_at(drawn); note<9>(); }", 1),
)  # fmt: skip

_ALU = (
    "BMSK BREV F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP FLO I2FP IABS IADD IADD3 ISETP LEA LOP3 MOV "
    "P2R PLOP3 POPC PRMT R2P SEL SGXT SHF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE"
).split()
_FMA = "FADD FADD2 FFMA FFMA2 FMUL FMUL2 FSWZADD HADD2 HFMA2 HMUL2 IMAD".split()
_SPECIAL = "MUFU I2F F2I F2F FRND".split()
_SHARED = "LDS STS LDGSTS LDG STG".split()


@dataclass(frozen=True)
class Cost:
    """What an element costs, in threads of an instruction; shared memory in wavefronts."""

    issue: float
    fma: float
    alu: float
    special: float
    shared: float
    mufu: float
    mix: dict[str, float]


def tool(name: str) -> str:
    """A CUDA program: on PATH, beside nvcc, or in the Python packages that bring it."""
    if found := shutil.which(name):
        return found
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    places = [Path(nvcc).resolve().parent]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        places += [Path(p, folder) for p in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        if found := shutil.which(name, path=str(place)):
            return found
    sys.exit(f"{name} was not found; pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump")


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints, both ways; its errors end this program."""
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr}")
    return run.stdout + run.stderr


def disassemble(cubin: Path) -> dict[str, list[str]]:
    """Lines of machine code by the mangled name of a kernel: instructions, and labels with ':'."""
    text = output_of(tool("nvdisasm"), "-c", str(cubin))
    code = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        lines = re.findall(r"^(\.L_x_\d+:)|/\*[0-9a-f]{4,}\*/\s+([^;]*?) *;", section, re.M)
        code[section[: section.index(",")]] = [label or line for label, line in lines]
    return code


def opcode(line: str) -> str:
    """The instruction's name with its suffixes, without a predicate."""
    return re.sub(r"^@!?U?P\w+ +", "", line).split()[0]


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


def weighted(lines: Sequence[str], weights: dict[int, float]) -> Counter[str]:
    """Instructions of a thread and tile by name, marks left out.

    A mark weighs its whole basic block, in which the compiler may have moved it.
    """
    total: Counter[str] = Counter()
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
                total[opcode(line)] += weight  # type: ignore[assignment]
        for mark in marks:
            if mark % 2:
                within.remove(mark - 1)
    assert not within, within
    del total["PMTRIG"]
    return total


def hot_source(source: Path, folder: Path) -> None:
    """A copy of the sources whose kernel has only its hot path, with marks."""
    shutil.copytree(source, folder / "csrc")
    path = folder / "csrc/cuda/scan.cuh"
    text = path.read_text()
    for old, new, count in REPLACEMENTS:
        if text.count(old) != count:
            sys.exit(f"{text.count(old)} times in scan.cuh, expected {count}: {old}")
        text = text.replace(old, new)
    path.write_text(text)


def compile_kernels(folder: Path, dtype: str, arch: str, ops: Sequence[str]) -> dict[str, Any]:
    """The code of both passes of these ops, by op and pass."""
    lines, order = ['#include "csrc/cuda/scan.cuh"', "namespace msrnn {"], []
    for op, backward in product(ops, (False, True)):
        of = f"{OPS[op].kind}, {DTYPES[dtype]}, {str(backward).lower()}"
        arguments = "(const __grid_constant__ ScanCall)"
        lines.append(f"template __global__ void gpu::scan_kernel<{of}>{arguments};")
        bits = re.sub(r"(\w+)<(\w+)>", r"\1ILb0E", OPS[op].kind)
        order.append((op, PASSES[backward], f"{bits}E.*Lb{int(backward)}E"))
    path = folder / f"{dtype}_{arch}.cu"
    path.write_text("\n".join([*lines, "}"]))
    cubin = path.with_suffix(".cubin")
    output_of(
        *(tool("nvcc"), "-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin"),
        *(str(path), "-o", str(cubin)),
    )
    code = disassemble(cubin)
    found = {}
    for op, which, pattern in order:
        (name,) = (name for name in code if re.search(rf"\d{pattern}", name))
        found[op, which] = code[name]
    return found


def wavefronts(name: str) -> float:
    """Of 128 bytes, for a warp."""
    base, *suffixes = name.split(".")
    if base not in _SHARED:
        return 0
    return 4 if "128" in suffixes else 2 if "64" in suffixes else 1


def cost_of(lines: Sequence[str], op: str, dtype: str, which: str) -> Cost:
    """Of an element: what a thread does for a tile, over its elements."""
    backward, vector = which == "backward", 16 // SIZES[dtype]
    counts = weighted(lines, weights_of(backward, vector))
    reads, writes = OPS[op].tensors[backward]
    steps, elements = 4, 4 * vector
    wide = {
        base: sum(n for name, n in counts.items() if name.startswith(base) and ".128" in name)
        for base in ("LDGSTS", "STG")
    }
    # If not, what was cut or marked is not what it was thought to be.
    assert wide == {"LDGSTS": steps * reads, "STG": steps * writes}, (op, dtype, which, wide)
    assert sum(n for name, n in counts.items() if name.startswith("BAR.SYNC")) == 4, counts

    by_base: Counter[str] = Counter()
    for name, n in counts.items():
        by_base[name.split(".")[0]] += n

    def each(names: Sequence[str]) -> float:
        return sum(by_base[name] for name in names) / elements

    return Cost(
        issue=sum(by_base.values()) / elements,
        fma=each(_FMA),
        alu=each(_ALU),
        special=each(_SPECIAL),
        shared=sum(wavefronts(name) * n for name, n in counts.items()) / elements,
        mufu=each(["MUFU"]),
        mix={name: round(n / elements, 2) for name, n in by_base.most_common(24)},
    )


def exchanged(op: str, dtype: str, which: str) -> float:
    """Bytes of an element that blocks exchange through memory in look-back.

    A tile writes its span, 3 words a channel, and reads on average half a group's and a carry of 2
    words; the last of a group writes one.
    """
    group, steps = 16, 128 if which == "backward" else 256
    span, carry = 3 * 4, 2 * 4
    return (span + (group - 1) / 2 * span + carry + carry / group) / steps


def estimate(machine: Machine, cost: Cost, bytes_: float, exchange: float) -> dict[str, Any]:
    """Seconds of an element on the whole GPU, and what share of a copy's bandwidth that is."""
    per_second = machine.multiprocessors * machine.clock
    rates = {
        "issue": 128,
        "fma": 64 if machine.arch == "80" else 128,
        "alu": 64,
        "special": 16,
        "shared": 32,
    }
    copy = bytes_ / machine.bandwidth
    times = {name: getattr(cost, name) / rate / per_second for name, rate in rates.items()}
    shares = {}
    for path, moved in (("walk", bytes_), ("look_back", bytes_ + exchange)):
        all_times = {"memory": moved / machine.bandwidth, **times}
        limit = max(all_times, key=lambda name: all_times[name])
        shares[path] = {"share": copy / all_times[limit], "limit": limit}
    return {"copy": copy, **times, **shares}


def measure(source: Path, ops: Sequence[str], archs: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each op, dtype, pass and architecture."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        hot_source(source, folder)
        jobs = list(product(DTYPES, archs))
        code = dict(
            zip(jobs, pool.map(lambda job: compile_kernels(folder, *job, ops), jobs), strict=True)
        )
    rows = []
    for arch, op, which, dtype in product(archs, ops, PASSES, DTYPES):
        cost = cost_of(code[dtype, arch][op, which], op, dtype, which)
        bytes_ = sum(OPS[op].tensors[which == "backward"]) * SIZES[dtype]
        exchange = exchanged(op, dtype, which)
        row = {"arch": arch, "op": op, "dtype": dtype, "pass": which, "bytes": bytes_}
        machines = {m.name: estimate(m, cost, bytes_, exchange) for m in MACHINES if m.arch == arch}
        rows.append({**row, "exchanged": exchange, "cost": asdict(cost), "machines": machines})
    return rows


def share_text(share: dict[str, Any]) -> str:
    colour = "green" if share["share"] >= GOAL else "red"
    limit = "" if share["limit"] == "memory" else f" {share['limit']}"
    return f"[{colour}]{share['share']:.0%}[/{colour}]{limit}"


def show(rows: Sequence[dict[str, Any]], arch: str) -> None:
    """Counts per element, and the share of a copy's bandwidth on each GPU of an architecture."""
    table = Table(title=f"sm_{arch}, per element", title_justify="left")
    counts = ("issue", "fma", "alu", "special", "shared")
    machines = [m.name for m in MACHINES if m.arch == arch]
    for column in ("op", "dtype", "pass"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes", *counts, *machines, "look-back"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["arch"] != arch:
            continue
        figures = [f"{row['cost'][name]:.2f}" for name in counts]
        shares = [share_text(row["machines"][name]["walk"]) for name in machines]
        shares.append(share_text(row["machines"][machines[-1]]["look_back"]))
        words = [row["op"], row["dtype"], row["pass"], str(row["bytes"])]
        table.add_row(*words, *figures, *shares)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--archs", default="80,90,100,120", help="default: %(default)s")
    parser.add_argument("--ops", default=",".join(OPS), help="default: %(default)s")
    parser.add_argument("--source", type=Path, default=ROOT / "csrc", help="default: csrc")
    parser.add_argument("--output", type=Path, help="folder for roofline.json")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    archs, ops = options.archs.split(","), options.ops.split(",")
    rows = measure(options.source, ops, archs)
    for arch in archs:
        show(rows, arch)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        results = {"machines": [asdict(machine) for machine in MACHINES], "rows": rows}
        path = options.output / "roofline.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
