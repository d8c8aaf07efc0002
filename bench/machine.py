"""What the numbers were measured on, without host names and paths."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from typing import Any

import torch

import msrnn_ops as ms


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def head(command: str, words: Sequence[str]) -> dict[str, Any]:
    """How a results file begins: when, by which command line, on what; files without folders."""
    shown = [command, *(re.sub(r"[^\s=]*/(?=[^/])", "", word) for word in words)]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(shown),
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
    }


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "msrnn_ops": ms.build_info(),
    }
