"""``python tests/budgets/planted.py [PATTERN]``: the facts of ptxas.py notice bugs in the source.

Each file of mutations/ is a bug in the format of tests/emulation/check.py, with the kernel that is
compiled, and with what must notice it: a fact that differs from that of the kernel without the bug,
or words of a fault. Most of them change what only nvcc reads of device.h, where the emulator of the
source has functions of its own. A kernel takes nvcc some seconds; no GPU is needed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.estimates.machine_code import DTYPES, OPS, ROOT
from tests.budgets.cuda import Budget, compile_file, measure_file
from tests.emulation.check import Mutation, plant, read_mutation

HERE = Path(__file__).parent
FOLDER = ROOT / "build/budget/planted"
ARCH = "90"


def measure_kernel(kernel: str, folder: Path) -> Budget:
    """One kernel of the sources in a folder, compiled alone."""
    op, dtype, which = kernel.split("/")
    kind, backward = DTYPES[dtype].kind, str(which == "backward").lower()
    if op == "attend_evict":
        header, template = "step", f"step_kernel<{kind}, {which}>(const __grid_constant__ StepCall)"
    else:
        arguments = f"{OPS[op].kind}, {kind}, {backward}"
        header = "scan"
        template = f"scan_kernel<{arguments}>(const __grid_constant__ ScanCall)"
    source = folder / "kernel.cu"
    source.write_text(
        f'#include "csrc/cuda/{header}.cuh"\n'
        f"namespace msrnn::gpu {{ template __global__ void {template}; }}\n"
    )
    compile_file(source, folder / "kernel.fatbin", ARCH, [ARCH])
    return measure_file(folder / "kernel.fatbin", [ARCH])[f"{kernel}/sm_{ARCH}"]


def copy_of_sources(name: str) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def noticed(mutation: Mutation, name: str, right: Budget) -> list[str]:
    """The facts that differ and the faults that are new."""
    folder = copy_of_sources(name)
    plant(mutation, folder / "csrc")
    wrong = measure_kernel(mutation.settings["kernel"], folder)
    facts = [fact for fact, count in wrong.facts.items() if count != right.facts[fact]]
    return facts + [fault for fault in wrong.faults if fault not in right.faults]


def main(pattern: str = "*") -> int:
    planted = {path: read_mutation(path) for path in sorted(HERE.glob(f"mutations/{pattern}.txt"))}
    kernels = sorted({mutation.settings["kernel"] for mutation in planted.values()})

    def check(path: Path) -> bool:
        started, mutation = time.monotonic(), planted[path]
        found = noticed(mutation, path.stem, right[mutation.settings["kernel"]])
        caught = any(mutation.settings["caught"] in text for text in found)
        words = "; ".join(found[:4]) or "nothing"
        took = time.monotonic() - started
        print(f"  {took:4.0f} s  {'' if caught else 'NOT CAUGHT '}{mutation.title}: {words}")
        return caught

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [copy_of_sources(kernel.replace("/", "_")) for kernel in kernels]
        right = dict(zip(kernels, pool.map(measure_kernel, kernels, folders), strict=True))
        caught = list(pool.map(check, planted))
    print(f"{sum(caught)} of {len(caught)} planted bugs noticed in the machine code")
    return int(not caught or not all(caught))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
