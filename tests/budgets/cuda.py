"""What the compiler makes of the CUDA kernels, against the table in cuda.json. No GPU is needed.

    python tests/budgets/cuda.py [--check | --update] [--archs 75,90] [--dtypes float32,...]
                                 [--kernels min_gru/bfloat16,...]

Every kernel is compiled for every architecture that wheels hold. A stored table has its registers,
its static shared memory, its instructions, and the facts of ptxas.py: how often PTX has a barrier,
an acquire, a wide load, a special function, a fused multiply-add and the like, and how many more
the machine code has (24-5: PTX has 24 and the machine code 19). A spill or a narrow load costs a
kernel that lives on bandwidth more than any arithmetic, and nothing else would tell: results stay
right. A fence that is missing shows in results, but on no processor that the tests run on.

Whatever the compiler, a kernel must have no faults as ptxas.py finds them, must neither spill nor
have a stack frame, and must load and store 16 bytes at a time, unless it is evict, which reads a
few scores, or a step on rows by index, which moves a few channels. With the compiler of the table
its registers must also leave room for as many blocks, its facts must be the same, and it must have
at most a tenth more instructions; other compilers only report these. `--kernels` takes beginnings
of names.

Nearly all time goes into cicc (C++ to PTX, 60 %) and ptxas, nothing into a front end that several
architectures could share. So PTX is made once for those whose PTX differs in its name alone, as
many compilers run as there are cores, the longest first, and what is newer than csrc is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.estimates.machine_code import KERNELS as NAMES
from bench.estimates.machine_code import ROOT, disassemble, kernel_name, output_of, tool
from bench.table import Table, show
from tests.budgets.ptxas import FACTS, facts_of, faults_of, ptx_of

TABLE = Path(__file__).with_suffix(".json")
FOLDER = ROOT / "build/budget"

# Architectures, by the one whose PTX they are compiled from.
PTX = {"75": "75", "80": "80", "86": "80", "89": "80", "90": "90", "100": "100", "120": "120"}
KERNELS = list(NAMES.values())
NARROW = (
    "evict/",
    "min_gru_step/",
    "min_gru_identity_step/",
    "min_lstm_step/",
    "min_lstm_identity_step/",
)

Usage = dict[str, "Budget"]  # by "kernel/sm_90"


@dataclass(frozen=True)
class Budget:
    """What one kernel takes on one architecture."""

    registers: int  # of a thread
    shared: int  # static, of a block, in bytes
    instructions: int
    facts: dict[str, str]
    faults: list[str] = field(default_factory=list)  # what no compiler may do

    def cells(self) -> dict[str, str]:
        """What is stored, by name."""
        numbers = {name: str(getattr(self, name)) for name in NUMBERS}
        return {**numbers, **self.facts}

    def resident(self, threads: int) -> int:
        """How many blocks the 64 Ki registers of a multiprocessor hold."""
        return 65536 // (threads * 8 * math.ceil(self.registers / 8))

    def regressions(self, stored: Budget, threads: int) -> list[str]:
        """What the compiler of the table may not do."""
        more = ["registers"] * (self.resident(threads) < stored.resident(threads))
        more += ["shared"] * (self.shared > stored.shared)
        more += ["instructions"] * (self.instructions > 1.1 * stored.instructions)
        return more + [name for name in FACTS if self.facts[name] != stored.facts[name]]


NUMBERS = ("registers", "shared", "instructions")
COLUMNS = (*NUMBERS, *FACTS)


def nvcc_version() -> str:
    text = output_of(tool("nvcc"), "--version")
    return re.findall(r"release (\S+),", text)[0]


def source_of(kernel: str) -> str:
    """The file that compiles a kernel, in csrc/cuda and without its suffix."""
    op, dtype, _ = kernel.split("/")
    if op == "evict":
        return op
    if op.endswith("_step"):
        return "row_step"
    return f"instantiations/{'step' if op == 'attend_evict' else 'scan'}_{dtype}"


def compile_file(source: Path, fatbin: Path, ptx: str, archs: list[str]) -> None:
    """The fatbin of one source, with its PTX; what ptxas says of its kernels lies beside it."""
    codes = ",".join([f"compute_{ptx}", *(f"sm_{arch}" for arch in archs)])
    generate = f"-gencode=arch=compute_{ptx},code=[{codes}]"
    command = ["-std=c++20", "-O3", generate, "-fatbin", "-Xptxas", "-v"]
    said = output_of(tool("nvcc"), *command, str(source), "-o", str(fatbin))
    fatbin.with_suffix(".log").write_text(said)


def compile_anew(folder: Path, source: str, ptx: str, archs: list[str]) -> Path:
    """The fatbin of a source, unless it is newer than the sources."""
    fatbin = folder / f"{Path(source).name}.{ptx}.{'_'.join(archs)}.fatbin"
    log = fatbin.with_suffix(".log")
    sources = (path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md")
    newest = max(path.stat().st_mtime for path in sources)
    if not log.exists() or log.stat().st_mtime <= newest:
        started = time.time()
        compile_file(ROOT / f"csrc/cuda/{source}.cu", fatbin, ptx, archs)
        os.utime(log, (started, started))  # what is edited meanwhile is newer
    return fatbin


def memory_of(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """From ptxas: the key of each kernel, its registers, and bytes of memory by their names."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    names = ("stack frame", "spill stores", "spill loads", "registers", "shared")
    for name, arch, *numbers, rest in re.findall(pattern, log, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        if kernel := kernel_name(name):
            values = map(int, [*numbers, shared[1] if shared else 0])
            yield f"{kernel}/sm_{arch}", dict(zip(names, values, strict=True))


def budget_of(kernel: str, memory: dict[str, int], ptx: list[str], code: list[str]) -> Budget:
    """From what ptxas says of a kernel, its PTX and its machine code."""
    facts, faults = facts_of(ptx, code), faults_of(code)
    local = ("stack frame", "spill stores", "spill loads")
    faults += [f"{memory[name]} bytes of {name}" for name in local if memory[name]]
    for names in (("loads", "copies"), ("stores",)):
        if not kernel.startswith(NARROW) and not any(
            in_machine_code(facts[name]) for name in names
        ):
            faults.append(f"no {names[0]} of 16 bytes")
    instructions = sum(not line.endswith(":") for line in code)
    return Budget(memory["registers"], memory["shared"], instructions, facts, faults)


def in_machine_code(fact: str) -> int:
    return sum(map(int, re.findall(r"[+-]?\d+", fact)))


def measure_file(fatbin: Path, archs: list[str]) -> Usage:
    """The budgets of the kernels of one source."""
    parts = fatbin.with_suffix("")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    for kind in ("elf", "ptx"):
        output_of(tool("cuobjdump"), f"-x{kind}", "all", str(fatbin), cwd=parts)
    memory = dict(memory_of(fatbin.with_suffix(".log").read_text()))
    (path,) = parts.glob("*.ptx")
    before = ptx_of(path.read_text())
    usage = {}
    for arch in archs:
        (cubin,) = parts.glob(f"*sm_{arch}.cubin")
        for kernel, code in disassemble(cubin).items():
            key = f"{kernel}/sm_{arch}"
            usage[key] = budget_of(kernel, memory[key], before[kernel], code)
    return usage


def measure(kernels: list[str], archs: list[str]) -> Usage:
    """The budgets of these kernels for these architectures."""
    folder = FOLDER / nvcc_version()
    folder.mkdir(parents=True, exist_ok=True)
    sources = dict.fromkeys(source_of(kernel) for kernel in kernels)
    shared = {ptx: [a for a in archs if PTX[a] == ptx] for ptx in (PTX[a] for a in archs)}
    jobs = [(folder, source, ptx, same) for ptx, same in shared.items() for source in sources]
    jobs.sort(key=lambda job: len(job[3]), reverse=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda job: measure_file(compile_anew(*job), job[3]), jobs))
    usage = {key: budget for part in parts for key, budget in part.items()}
    keys = [f"{kernel}/sm_{arch}" for kernel in kernels for arch in archs]
    if missing := [key for key in keys if key not in usage]:
        sys.exit(f"not found in the machine code: {', '.join(missing)}")
    return {key: usage[key] for key in keys}


def load() -> tuple[str, Usage]:
    """The stored table and the compiler it holds for."""
    if not TABLE.exists():
        return "", {}
    stored = json.loads(TABLE.read_text())
    usage = {}
    for key, row in stored["budgets"].items():
        cells = dict(zip(COLUMNS, row, strict=True))
        facts = {name: str(cells.pop(name)) for name in FACTS}
        usage[key] = Budget(**cells, facts=facts)
    return stored["nvcc"], usage


def save(version: str, usage: Usage) -> None:
    """One line for each kernel and architecture, in the order of KERNELS and PTX."""
    order = [f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in PTX]
    cells = {key: usage[key].cells().values() for key in order if key in usage}
    rows = {key: [int(c) if c.isdigit() else c for c in row] for key, row in cells.items()}
    lines = ",\n".join(f'    "{key}": {json.dumps(row)}' for key, row in rows.items())
    names = json.dumps(COLUMNS)
    TABLE.write_text(
        f'{{\n  "nvcc": "{version}",\n  "fields": {names},\n  "budgets": {{\n{lines}\n  }}\n}}\n'
    )


def compare(usage: Usage, stored: Usage, strict: bool) -> tuple[list[list[str]], bool]:
    """The differences as rows of a table, and whether one of them must not be."""
    rows, failed = [], False
    for key, now in usage.items():
        before = stored.get(key)
        bad = now.regressions(before, 128 if "/backward/" in key else 256) if before else []
        bad = bad if strict else []
        rows += [[key, fault, "", "", "fails"] for fault in now.faults]
        if strict and not before:
            rows.append([key, "not in the table", "", "", "fails"])
        failed |= bool(bad or now.faults) or (strict and not before)
        old = before.cells() if before else dict.fromkeys(COLUMNS, "")
        for name, cell in now.cells().items():
            if old[name] not in ("", cell):
                rows.append([key, name, old[name], cell, "fails" if name in bad else ""])
    return rows, failed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where a kernel got worse")
    action.add_argument("--update", action="store_true", help="store what was measured")
    parser.add_argument("--archs", default=",".join(PTX), help="default: %(default)s")
    parser.add_argument("--dtypes", default="", help="default: all")
    parser.add_argument("--kernels", default="", help="beginnings of names; default: all")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    started = time.perf_counter()
    kernels = [k for k in KERNELS if k.startswith(tuple(options.kernels.split(",")))]
    if options.dtypes:
        kernels = [k for k in kernels if k.split("/")[1] in options.dtypes.split(",")]
    usage = measure(kernels, [a for a in PTX if a in options.archs.split(",")])
    version, (stored_version, stored) = nvcc_version(), load()
    print(f"nvcc {version}, {len(usage)} kernels, {time.perf_counter() - started:.0f} s")
    if options.update:
        same = stored_version == version
        save(version, {**(stored if same else {}), **usage})
    if not (options.check or options.update):
        for key, budget in usage.items():
            print(key, *(f"{name}={cell}" for name, cell in budget.cells().items() if cell != "0"))
            print(*(f"    {fault}\n" for fault in budget.faults), sep="", end="")
        return 0
    rows, failed = compare(usage, stored, strict=options.check and version == stored_version)
    if rows:
        against = f"against the table of nvcc {stored_version or '(none)'}"
        show(Table(f"Differences {against}", "", ["kernel", "", "stored", "now", ""], rows))
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
