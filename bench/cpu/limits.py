"""How fast this machine's memory can be copied and read, measured now: the ceilings of the ops.

A tiny C program reads, and copies with non-temporal stores, which do not read the lines that
they overwrite. Without a C compiler or off x86-64 PyTorch does both; ``method()`` says which.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Entries, interleaved
from bench.table import say

_SOURCE = r"""
#include <stddef.h>
#include <xmmintrin.h>

float streaming_read(const float* source, size_t lines, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (size_t block = 0; block < lines; block += 1024) {
    __m128 sum[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
    size_t end = block + 1024 < lines ? block + 1024 : lines;
    for (size_t line = block; line < end; ++line) {
      const float* from = source + 16 * line;
      _mm_prefetch((const char*)(from + 2048), _MM_HINT_T0);
      for (int i = 0; i < 4; ++i) sum[i] = _mm_add_ps(sum[i], _mm_load_ps(from + 4 * i));
    }
    total += _mm_cvtss_f32(_mm_add_ps(_mm_add_ps(sum[0], sum[1]), _mm_add_ps(sum[2], sum[3])));
  }
  return total;
}

void streaming_copy(const float* source, float* target, size_t lines, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t line = 0; line < lines; ++line) {
    const float* from = source + 16 * line;
    float* to = target + 16 * line;
    _mm_prefetch((const char*)(from + 2048), _MM_HINT_T0);
    for (int i = 0; i < 16; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
  }
}
"""
_LINE = 64  # bytes
_SIZES = tuple(megabytes << 20 for megabytes in (4, 16, 64, 256, 1024))


@cache
def _compiled() -> Any:
    """The compiled functions, or None where they cannot be had."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "copy.c"), Path(folder, "copy.so")
        source.write_text(_SOURCE)
        command = ["cc", "-O3", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            functions = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None
    copy, read = functions.streaming_copy, functions.streaming_read
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    copy.restype = None
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    read.restype = ctypes.c_float
    return functions


def method() -> str:
    return "C, non-temporal stores" if _compiled() else "Tensor.copy_"


def copier(traffic: int) -> Callable[[], object]:
    """A call that moves `traffic` bytes: half of them read, half of them written."""
    lines = max(traffic // 2 // _LINE, 1)
    source, target = (torch.rand((lines + 1) * _LINE // 4) for _ in range(2))
    functions = _compiled()
    if functions is None:
        return lambda: target.copy_(source)
    start, end = (-(-x.data_ptr() // _LINE) * _LINE for x in (source, target))

    def call(_alive: object = (source, target)) -> None:
        functions.streaming_copy(start, end, lines, torch.get_num_threads())

    return call


def reader(traffic: int) -> Callable[[], object]:
    """A call that reads `traffic` bytes."""
    lines = max(traffic // _LINE, 1)
    source = torch.rand((lines + 1) * _LINE // 4)
    functions = _compiled()
    if functions is None:
        return lambda: source.sum()
    start = -(-source.data_ptr() // _LINE) * _LINE

    def call(_alive: Tensor = source) -> None:
        functions.streaming_read(start, lines, torch.get_num_threads())

    return call


def run(seconds: float) -> Entries:
    """The part ``limits``: copy bandwidth by size."""
    rows: list[dict[str, Any]] = []
    for size in _SIZES:
        call = copier(size)
        call()
        timing = interleaved({"copy": call}, seconds)["copy"]
        rate = size / timing["median"]
        rows.append({"traffic": size, "bytes_per_second": rate, "time": timing})
        say(f"copying {size >> 20} MiB: {rate / 1e9:.1f} GB/s")
        yield {"limits": {"method": method(), "copies": rows}}
