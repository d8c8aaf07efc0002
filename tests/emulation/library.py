"""``python tests/emulation/library.py``: the CUDA operators, their kernels on the emulator.

The library registers them for CPU tensors, in place of the CPU's own kernels. With its path in
``MSRNN_TEST_KERNELS`` the test suite runs the source of the CUDA kernels, and of their host side.
Prints that path. ``CXXFLAGS`` adds to the compiler's options.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulation" / "torch"
INSTANTIATIONS = "csrc/cuda/instantiations"
SOURCES = [
    "tests/emulation/runtime.cpp",
    *("csrc/cuda/multi_state.cpp", "csrc/cuda/multi_state.cu", "csrc/cuda/evict.cu"),
    *(f"{INSTANTIATIONS}/step_{name}.cu" for name in ("float32", "bfloat16", "float16")),
    *("csrc/cuda/scan.cpp", "csrc/cuda/scan.cu", "csrc/cuda/row_step.cu"),
    *(f"{INSTANTIATIONS}/scan_{name}.cu" for name in ("float32", "float64", "bfloat16", "float16")),
]
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Itests/emulation"),
    *("-DMSRNN_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


def compile_one(source: str) -> Path:
    target = FOLDER / f"{Path(source).name}.o"
    inputs = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/emulation").glob("*.*")]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return target
    command = [os.environ.get("CXX", "g++"), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    command += [f"-isystem{path}" for path in include_paths()]
    language = ["-x", "c++"] if source.endswith(".cu") else []
    subprocess.run([*command, *language, "-c", source, "-o", target], cwd=ROOT, check=True)
    return target


def build() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = FOLDER / "msrnn_emulated.so"
    command = [os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(library)]
    command += [f"-L{path}" for path in library_paths()]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    return library


if __name__ == "__main__":
    print(build())
