"""What the compiler makes of the CUDA kernels, against the table in cuda.json. No GPU is needed.

    python tests/budgets/cuda.py [--check | --update] [--archs 75,90] [--dtypes float32,...]
                                 [--kernels min_gru/bfloat16,...]

Every kernel is compiled for every architecture that wheels hold, and its registers, stack frame,
spills, static shared memory and, from the machine code, its 16-byte loads and stores, special
functions and instructions are compared with the stored table. A spill costs a kernel that lives on
bandwidth more than any arithmetic, and nothing else would tell: results stay right.

Whatever the compiler, a kernel must neither spill nor have a stack frame, and must load and store
16 bytes at a time. With the compiler of the table its registers must also leave room for as many
blocks, it must have the same number of wide accesses and at most a tenth more instructions; other
compilers only report these. `--kernels` takes beginnings of names.

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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.estimates.machine_code import KERNELS as NAMES
from bench.estimates.machine_code import ROOT, disassemble, kernel_name, opcode, output_of, tool
from bench.table import Table, show

TABLE = Path(__file__).with_suffix(".json")
FOLDER = ROOT / "build/budget"

# Architectures, by the one whose PTX they are compiled from.
PTX = {"75": "75", "80": "80", "86": "80", "89": "80", "90": "90", "100": "100", "120": "120"}
KERNELS = list(NAMES.values())

Usage = dict[str, "Budget"]  # by "kernel/sm_90"


@dataclass(frozen=True)
class Budget:
    """What one kernel takes on one architecture; bytes of memory are those of a thread."""

    registers: int
    shared: int  # static, of a block
    stack: int
    spill_stores: int
    spill_loads: int
    wide_loads: int
    wide_stores: int
    special: int
    instructions: int

    def faults(self) -> list[str]:
        """What no compiler may do."""
        bad = [n for n in ("stack", "spill_stores", "spill_loads") if getattr(self, n)]
        return bad + [n for n in ("wide_loads", "wide_stores") if not getattr(self, n)]

    def resident(self, threads: int) -> int:
        """How many blocks the 64 Ki registers of a multiprocessor hold."""
        return 65536 // (threads * 8 * math.ceil(self.registers / 8))

    def regressions(self, stored: Budget, threads: int) -> list[str]:
        """What the compiler of the table may not do."""
        more = ["registers"] * (self.resident(threads) < stored.resident(threads))
        more += ["shared"] * (self.shared > stored.shared)
        wide = ("wide_loads", "wide_stores")
        more += [n for n in wide if getattr(self, n) != getattr(stored, n)]
        grown = self.instructions > 1.1 * stored.instructions
        return more + ["instructions"] * grown


def nvcc_version() -> str:
    text = output_of(tool("nvcc"), "--version")
    return re.findall(r"release (\S+),", text)[0]


def source_of(kernel: str) -> str:
    """The file that compiles a kernel, without its suffix."""
    op, dtype, _ = kernel.split("/")
    return f"step_{dtype}" if op == "attend_evict" else f"scan_{dtype}"


def compile_file(folder: Path, source: str, ptx: str, archs: list[str]) -> Path:
    """The fatbin of one source; what ptxas says of its kernels lies beside it."""
    fatbin = folder / f"{source}.{'_'.join(archs)}.fatbin"
    log = fatbin.with_suffix(".log")
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    if log.exists() and log.stat().st_mtime > newest:
        return fatbin
    started = time.time()
    codes = f"-gencode=arch=compute_{ptx},code=[{','.join(f'sm_{a}' for a in archs)}]"
    command = ["-std=c++20", "-O3", codes, "-fatbin", "-Xptxas", "-v"]
    path = f"csrc/cuda/instantiations/{source}.cu"
    log.write_text(output_of(tool("nvcc"), *command, path, "-o", str(fatbin)))
    os.utime(log, (started, started))  # what is edited meanwhile is newer
    return fatbin


def memory_of(log: str) -> Iterator[tuple[str, list[int]]]:
    """From ptxas: the key of each kernel, then registers, shared, stack and spilled bytes."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, log, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = [registers, shared[1] if shared else 0, stack, stores, loads]
        if kernel := kernel_name(name):
            yield f"{kernel}/sm_{arch}", [int(n) for n in numbers]


def code_of(cubin: Path, arch: str) -> Iterator[tuple[str, list[int]]]:
    """From the machine code: wide loads and stores, special functions, all instructions."""
    for kernel, lines in disassemble(cubin).items():
        direct = arch == "75" or kernel.startswith("attend_evict")
        load = "LDG" if direct else "LDGSTS"
        names = [opcode(line) for line in lines if not line.endswith(":")]
        wide = Counter(name.split(".")[0] for name in names if ".128" in name)
        special = sum(name.startswith("MUFU") for name in names)
        yield f"{kernel}/sm_{arch}", [wide[load], wide["STG"], special, len(names)]


def measure_file(folder: Path, source: str, ptx: str, archs: list[str]) -> Usage:
    """The budgets of the kernels of one source."""
    fatbin = compile_file(folder, source, ptx, archs)
    cubins = folder / fatbin.stem
    shutil.rmtree(cubins, ignore_errors=True)
    cubins.mkdir()
    output_of(tool("cuobjdump"), "-xelf", "all", str(fatbin), cwd=cubins)
    memory = dict(memory_of(fatbin.with_suffix(".log").read_text()))
    usage = {}
    for arch in archs:
        (cubin,) = cubins.glob(f"*sm_{arch}.cubin")
        for key, code in code_of(cubin, arch):
            usage[key] = Budget(*memory[key], *code)
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
        parts = list(pool.map(lambda job: measure_file(*job), jobs))
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
    return stored["nvcc"], {key: Budget(*row) for key, row in stored["budgets"].items()}


def save(version: str, usage: Usage) -> None:
    """One line for each kernel and architecture, in the order of KERNELS and PTX."""
    order = [f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in PTX]
    rows = (f'    "{key}": {list(astuple(usage[key]))}' for key in order if key in usage)
    names = json.dumps([field.name for field in fields(Budget)])
    lines = ",\n".join(rows)
    TABLE.write_text(
        f'{{\n  "nvcc": "{version}",\n  "fields": {names},\n  "budgets": {{\n{lines}\n  }}\n}}\n'
    )


def compare(usage: Usage, stored: Usage, strict: bool) -> tuple[list[list[str]], bool]:
    """The differences as rows of a table, and whether one of them must not be."""
    rows, failed = [], False
    for key, now in usage.items():
        before = stored.get(key)
        bad = now.faults()
        if strict and before:
            bad += now.regressions(before, 128 if "/backward/" in key else 256)
        if strict and not before:
            rows.append([key, "not in the table", "", "", "fails"])
        failed |= bool(bad) or (strict and not before)
        for field in fields(Budget):
            old, new = getattr(before or now, field.name), getattr(now, field.name)
            if old != new or field.name in bad:
                verdict = "fails" if field.name in bad else ""
                rows.append([key, field.name, str(old) if before else "", str(new), verdict])
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
        names = [field.name for field in fields(Budget)]
        rows = [[k, *map(str, astuple(b))] for k, b in usage.items()]
        show(Table("Kernels", "", ["kernel", *names], rows))
        return 0
    rows, failed = compare(usage, stored, strict=options.check and version == stored_version)
    if rows:
        against = f"against the table of nvcc {stored_version or '(none)'}"
        show(Table(f"Differences {against}", "", ["kernel", "", "stored", "now", ""], rows))
    return int(failed and options.check)


if __name__ == "__main__":
    sys.exit(main())
