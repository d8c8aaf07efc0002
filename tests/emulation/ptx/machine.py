"""The machine for PTX (machine.h), built with the host's compiler, and its calls from Python.

A kernel that goes wrong ends the process with a report, exit code 99: mistakes are planted in a
process of their own.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EMULATION = HERE.parent
ROOT = EMULATION.parents[1]
BUILD = ROOT / "build" / "emulation" / "ptx"
RUNTIME, TENSORS = HERE / "cuda_runtime.cpp", HERE / "torch_memory.cpp"  # for some programs only
SOURCES = [
    EMULATION / "runtime.cpp",
    *sorted(path for path in HERE.glob("*.cpp") if path not in (RUNTIME, TENSORS)),
]
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]


def compile_one(source: Path, target: Path, *flags: str) -> Path:
    """The object of a source, unless it is newer than all it could include."""
    headers = [*HERE.glob("*.h"), *EMULATION.glob("*.h")]
    newest = max(path.stat().st_mtime for path in (source, *headers))
    if not target.exists() or target.stat().st_mtime <= newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "g++"), *FLAGS, *flags]
        command += shlex.split(os.environ.get("CXXFLAGS", ""))
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    return target


def objects(*more: Path, sanitizer: str = "", flags: Iterable[str] = ()) -> list[Path]:
    """Those of the machine. Only its loads and stores are compiled with a sanitizer."""

    def one(source: Path) -> Path:
        seen = sanitizer if source.stem == "access" else ""
        name = f"{source.stem}{f'.{seen}' if seen else ''}.o"
        return compile_one(source, BUILD / name, *flags, *([f"-fsanitize={seen}"] if seen else []))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, [*SOURCES, *more]))


def link(target: Path, *arguments: str | Path) -> Path:
    command = [os.environ.get("CXX", "g++"), *map(str, arguments), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@cache
def library() -> ctypes.CDLL:
    """The machine, without a CUDA runtime around it."""
    target = BUILD / "libptx.so"
    parts = objects()
    if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in parts):
        link(target, "-shared", *parts)
    machine = ctypes.CDLL(str(target))
    machine.ptx_load.restype = ctypes.c_char_p
    machine.ptx_forms.restype = ctypes.c_char_p
    machine.ptx_allocated.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    machine.ptx_freed.argtypes = [ctypes.c_void_p]
    return machine


def forms() -> list[tuple[str, str]]:
    """All forms of instructions that the machine knows, with the kinds of their operands."""
    lines = library().ptx_forms().decode().splitlines()
    return [(name, kinds) for name, _, kinds in (line.partition(" ") for line in lines)]


def load(text: str) -> None:
    """The kernels of a module, by their names. ValueError says what the machine does not know."""
    if wrong := library().ptx_load(text.encode()):
        raise ValueError(wrong.decode())


def launch(
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared: int,
    values: Sequence[Any],
) -> None:
    """Runs a kernel. `values` are ctypes objects, one for each parameter."""
    machine = library()
    if machine.ptx_parameters(name.encode()) != len(values):
        raise ValueError(
            f"{name} takes {machine.ptx_parameters(name.encode())} parameters, not {len(values)}"
        )
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    three = ctypes.c_uint * 3
    code = machine.ptx_launch(
        name.encode(),
        three(*(*grid, 1, 1)[:3]),
        three(*(*block, 1, 1)[:3]),
        ctypes.c_uint64(shared),
        pointers,
    )
    if code:
        raise RuntimeError(f"{name}: no GPU runs a grid of {tuple(grid)} blocks of {tuple(block)}")


@cache
def announce_tensors() -> None:
    """From now on kernels may access what CPU tensors hold, and nothing else."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    library()
    include = [f"-isystem{path}" for path in include_paths()]
    memory = compile_one(TENSORS, BUILD / "torch_memory.o", *include)
    where = [f"-L{path}" for path in (BUILD, *library_paths())]
    target = BUILD / "libptx_memory.so"
    newest = max(path.stat().st_mtime for path in (memory, BUILD / "libptx.so"))
    if not target.exists() or target.stat().st_mtime < newest:
        link(target, "-shared", memory, *where, "-lptx", "-lc10", f"-Wl,-rpath,{BUILD}")
    torch.ops.load_library(str(target))
