"""A driver for Triton whose device is the machine for PTX: compiled for a GPU, run on the CPU.

Triton's own JIT specialises and compiles every launch for the architecture, as it would with a GPU
at hand; in place of loading the binary, this loads the PTX that it was made from, and in place of
the launch runs it on CPU tensors. ``MSRNN_TEST_TRITON=90`` runs the test suite so.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

_TYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "fp32": ctypes.c_float,
}  # fmt: skip
_SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a block may have
_POINTERS_TO_SCRATCH = 2  # the last parameters of every kernel

compiled: set[str] = set()  # the names of all kernels so far


def edited(ptx: str) -> str:
    """What runs in place of a kernel's text: bugs are planted here."""
    return ptx


def _values(kind: Any, value: Any) -> Iterator[Any]:
    """What a kernel gets of an argument: constants nothing, tuples all their parts."""
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from _values(k, v)
    elif kind.startswith("*"):
        yield ctypes.c_uint64(value.data_ptr())
    elif kind != "constexpr":
        yield _TYPES[kind](value)


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = list(source.signature.values())
        self._threads = 32 * metadata.num_warps
        self._shared = metadata.shared
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("a kernel that needs scratch memory")

    def __call__(self, x: int, y: int, z: int, stream: int, name: str, *rest: Any) -> None:
        arguments = rest[-len(self._kinds) :]
        values = [v for k, a in zip(self._kinds, arguments, strict=True) for v in _values(k, a)]
        values += [ctypes.c_uint64(0)] * _POINTERS_TO_SCRATCH
        machine.launch(name, (x, y, z), (self._threads,), self._shared, values)


class _Utilities:
    """What Triton asks of a driver when it loads a kernel."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self._ptx = ""
        knobs.runtime.kernel_load_start_hook.add(self._about_to_load)

    def _about_to_load(self, module: Any, function: Any, name: str, files: Any, hash: str) -> None:
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        self._ptx = edited(Path(path).read_text())

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Under a name of its own: one function is specialised to many kernels."""
        unique = f"{name}_{hashlib.sha256(self._ptx.encode()).hexdigest()[:12]}"
        machine.load(self._ptx.replace(name, unique))
        compiled.add(unique)
        return None, unique, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self._arch]}


class Driver:
    """One GPU of an architecture."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.utils = _Utilities(arch)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def activate(arch: int) -> None:
    machine.announce_tensors()
    triton.runtime.driver.set_active(Driver(arch))
