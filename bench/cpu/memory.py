"""The part ``memory``: the peak of one forward and backward pass, in a process of its own."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench import peers
from bench.measure import REUSE_FREED_MEMORY, Entries, peak_bytes
from bench.table import running, say

_SHAPE = (4, 4096, 1024)


def run() -> Entries:
    """In tensors of B·T·D float32; inputs and the gradient of the output are not counted."""
    rows: list[dict[str, Any]] = []
    for op, name in itertools.product(("min_gru", "min_lstm"), (peers.OURS, peers.HEINSEN)):
        with running(f"peak memory of {op}, {name}"):
            tensors = _in_a_process(op, name)
        rows.append({"op": op, "competitor": name, "shape": _SHAPE, "tensors": tensors})
        say(f"peak memory of {op}, {name}:", "n/a" if tensors is None else f"{tensors:.2f} tensors")
        yield {"memory": rows}


def _in_a_process(op: str, competitor: str) -> float | None:
    """None where it cannot be measured."""
    environment = {k: v for k, v in os.environ.items() if k not in REUSE_FREED_MEMORY}
    command = [sys.executable, "-m", "bench.cpu.memory", op, competitor]
    child = subprocess.run(
        [*command, str(torch.get_num_threads())], capture_output=True, text=True, env=environment
    )
    return float(child.stdout) if child.returncode == 0 else None


def main(name: str, competitor: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    op = peers.OPS[name]
    function = peers.COMPETITORS[competitor](op)

    def case(shape: Sequence[int]) -> peers.Pass:
        inputs = op.draw(tuple(shape), torch.float32)
        return peers.both_passes(function, inputs, torch.randn(shape))

    case((1, 256, 256))()  # threads and libraries start outside of the measurement
    print(peak_bytes(case(_SHAPE)) / (4 * math.prod(_SHAPE)))


if __name__ == "__main__":
    main(*sys.argv[1:])
