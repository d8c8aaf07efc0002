"""Other processes: a fresh Python, and the ranks of a process group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def output_of(*command: str, **environment: str) -> str:
    """What a command prints; the test fails with what it says where it fails."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_SANITIZERS = ("LD_PRELOAD", "ASAN_OPTIONS")  # without which a sanitized library does not load


def fresh_python(code: str, **environment: str) -> str:
    """What a fresh Python prints that has nothing of this environment but its modules' paths."""
    env = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), **environment}
    env |= {name: os.environ[name] for name in _SANITIZERS if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _enter(rank: int, work: Callable[..., None], ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(minutes=3)  # on a busy machine ranks start far apart
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=patience
    )
    work(rank)
    dist.destroy_process_group()
    # Functional collectives keep the group and its threads beyond destroy_process_group. A thread
    # of gloo's that frees the tensors of the last exchange while Python ends aborts the process.
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """run(work, ranks): work(rank) in so many processes; what one of them raises is raised here."""

    def start(work: Callable[..., None], ranks: int = 4) -> None:
        (tmp_path / "store").unlink(missing_ok=True)
        processes.spawn(_enter, (work, ranks, str(tmp_path / "store")), ranks)

    yield start
