"""Tiny PTX kernels on the machine of emulation/ptx, for its own tests."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from typing import Any

from emulation.ptx import machine

HEADER = """.version 8.8
.target sm_100
.address_size 64
.shared .align 128 .b8 memory[4096];
"""
# The machine needs a C++ compiler, and does not load into a Python with a sanitizer around it.
AVAILABLE = shutil.which(os.environ.get("CXX", "g++")) is not None and "asan" not in os.environ.get(
    "LD_PRELOAD", ""
)


def entry(name: str, body: str) -> str:
    """A kernel of two pointers, %in and %out, with some registers of each size."""
    return f"""
.visible .entry {name}(.param .u64 inputs, .param .u64 outputs)
{{
  .reg .pred %p<8>;
  .reg .b16 %h<24>;
  .reg .b32 %r<48>, %thread;
  .reg .b64 %d<24>, %in, %out;
  ld.param.u64 %in, [inputs];
  ld.param.u64 %out, [outputs];
  mov.u32 %thread, %tid.x;
  {body}
  ret;
}}
"""


class Memory:
    """Global memory that the machine knows, aligned to 256 bytes."""

    def __init__(self, content: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(len(content) + 256)
        self.address = -(-ctypes.addressof(self._buffer) // 256) * 256
        self._bytes = len(content)
        ctypes.memmove(self.address, content, len(content))
        machine.library().ptx_allocated(self.address, len(content))

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self._bytes)

    def free(self) -> None:
        machine.library().ptx_freed(self.address)


def run(
    name: str,
    inputs: bytes,
    outputs: int | bytes,
    block: int = 1,
    grid: int = 1,
    shared: int = 0,
    more: Sequence[Any] = (),
) -> bytes:
    """What a kernel leaves in its outputs: so many bytes, 0xEE before, or these.

    Its parameters are two pointers, and `more`.
    """
    before = outputs if isinstance(outputs, bytes) else b"\xee" * outputs
    given, made = Memory(inputs), Memory(before)
    values = [ctypes.c_uint64(given.address), ctypes.c_uint64(made.address), *more]
    machine.launch(name, (grid,), (block,), shared, values)
    given.free()
    made.free()
    return made.content()
