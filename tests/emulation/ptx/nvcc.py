"""``python tests/emulation/ptx/nvcc.py [--arch 90]``: the CUDA operators, run as nvcc's PTX.

The library registers them for CPU tensors, as that of ../library.py does for the source of the
kernels: with its path in ``MSRNN_TEST_KERNELS`` the test suite runs what nvcc emits, launched by
the host code that nvcc compiled. Prints that path.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import machine
from machine import BUILD, EMULATION, ROOT, RUNTIME, TENSORS, link

ARCHS = ("80", "90", "100", "120")
DTYPES = ("float32", "float64", "bfloat16", "float16")
KERNELS = {
    "driver": ("scan", "row_step", *(f"instantiations/scan_{dtype}" for dtype in DTYPES)),
    "step_driver": (
        *("multi_state", "evict"),
        *(f"instantiations/step_{dtype}" for dtype in DTYPES if dtype != "float64"),
    ),
}


def toolkit() -> Path:
    """Where CUDA's headers are: nvcc says so."""
    command = ["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (top,) = (line.partition("TOP=")[2] for line in told.splitlines() if "TOP=" in line)
    return Path(top.strip()) / "include"


def version() -> str:
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\S+),", told)[0]


def compile_kernels(arch: str, *drivers: str) -> list[Path]:
    """nvcc's objects: the host code, and PTX for this architecture that a wheel would carry."""

    def one(name: str) -> Path:
        source = ROOT / "csrc/cuda" / f"{name}.cu"
        target = BUILD / f"sm_{arch}" / f"{source.stem}.o"
        headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
        newest = max(path.stat().st_mtime for path in (source, *headers))
        if not target.exists() or target.stat().st_mtime <= newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            command = ["nvcc", "-std=c++20", "-O3", "-Xcompiler", "-fPIC", "--no-compress"]
            command += ["-Werror", "all-warnings"]  # a missing return is only a warning
            command += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    names = [name for driver in drivers or KERNELS for name in KERNELS[driver]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, names))


def text_of(kernels: Path) -> str:
    """The PTX that an object of nvcc carries."""
    code = kernels.read_bytes()
    begin = code.find(b"\n.version")
    return code[begin : code.index(b"\0", begin)].decode() if begin >= 0 else ""


def driver(name: str, arch: str, sanitizer: str = "") -> Path:
    """The program of ../driver.h that runs this many cases of the kernels, on their PTX."""
    kernels = compile_kernels(arch, name)
    include = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-I{toolkit()}"]
    parts = machine.objects(RUNTIME, sanitizer=sanitizer, flags=include)
    sanitize = [f"-fsanitize={sanitizer}"] if sanitizer else []
    source = EMULATION / f"{name}.cpp"
    cases = BUILD / f"{name}{sanitizer and '.'}{sanitizer}.o"
    parts.append(machine.compile_one(source, cases, *include, *sanitize))
    target = BUILD / f"sm_{arch}" / f"{name}{sanitizer and '.'}{sanitizer}"
    built = target.stat().st_mtime if target.exists() else 0.0
    if all(part.stat().st_mtime < built for part in (*parts, *kernels)):
        return target
    return link(target, *sanitize, *parts, *kernels)


def torch_library(arch: str) -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = compile_kernels(arch)
    torch = [f"-isystem{path}" for path in include_paths()]
    own = ["-DMSRNN_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{EMULATION}", f"-I{toolkit()}", *torch]
    parts = machine.objects(RUNTIME, TENSORS, flags=include)
    for name in ("scan", "multi_state"):
        source, target = ROOT / "csrc/cuda" / f"{name}.cpp", BUILD / f"torch_{name}.o"
        parts.append(machine.compile_one(source, target, *own, *include, "-w"))
    target = BUILD / f"sm_{arch}" / "msrnn_ptx.so"
    where = [f"-L{path}" for path in library_paths()]
    return link(target, "-shared", *parts, *kernels, *where, "-ltorch_cpu", "-lc10")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90", choices=ARCHS, help="default: %(default)s")
    print(torch_library(parser.parse_args().arch))
