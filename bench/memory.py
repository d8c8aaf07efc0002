"""Child process of the part ``ops``: prints the peak memory of one forward and backward pass."""

from __future__ import annotations

import math
import sys

import torch

from bench import peers
from bench.measure import peak_bytes


def main() -> None:
    name, competitor = sys.argv[1:3]
    batch, time, channels, threads = map(int, sys.argv[3:])
    torch.set_num_threads(threads)
    op = peers.OPS[name]
    function = peers.COMPETITORS[competitor](op)

    def case(*shape: int) -> peers.Pass:
        return peers.both_passes(function, op.draw(shape, torch.float32), torch.randn(shape))

    case(1, 256, 256)()  # threads and libraries start outside of the measurement
    shape = (batch, time, channels)
    print(peak_bytes(case(*shape)) / (4 * math.prod(shape)))


if __name__ == "__main__":
    main()
