"""``python tests/emulation/ptx/triton_cases.py NAME...``: Triton's kernels as PTX against float64.

The output is that of ../driver.cpp.

EMULATION_TRITON_EDIT names a file of mutations/ that is planted into the kernels it is about.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("MSRNN_TEST_TRITON", "90")
sys.path.append(str(Path(__file__).resolve().parents[2]))  # the tests

import backends
import rung
import torch

import msrnn_ops as ms

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def scan(dtype: torch.dtype, time: int, channels: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What min_gru computes and what is right: states and gradients."""
    made = []
    inputs = [torch.randn(2, time, channels).to(dtype) for _ in range(2)]
    weight = torch.randn(2, time, channels).to(dtype)
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        with ms.use_backend(backend):
            h = ms.min_gru(*leaves)
            gradients = torch.autograd.grad(h, leaves, weight.to(kind))
        made.append([h.detach(), *gradients])
    return list(zip(*made, strict=True))


CASES = {
    f"min_gru/{str(dtype).split('.')[1]}/{time}x{channels}": (dtype, time, channels)
    for dtype in TOLERANCE
    for time, channels in ((37, 33), (300, 8))
}


def plant(path: Path) -> None:
    import triton_driver
    from triton.backends.nvidia.compiler import get_ptxas

    mutation = rung.read_mutation(path)

    def edited(ptx: str) -> str:
        if not re.search(rf"\.entry {mutation.settings['kernel']}", ptx):
            return ptx
        ptxas = get_ptxas(int(os.environ["MSRNN_TEST_TRITON"])).path
        return rung.assembled(mutation, ptx, ptxas).read_text()

    triton_driver.edited = edited


def main() -> int:
    backends.choose()
    if "EMULATION_TRITON_EDIT" in os.environ:
        plant(Path(os.environ["EMULATION_TRITON_EDIT"]))
    wrong = 0
    for name in sys.argv[1:] or CASES:
        torch.manual_seed(1)
        dtype, *_ = CASES[name]
        pairs = scan(*CASES[name])
        error = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        bits = b"".join(x.view(torch.uint8).numpy().tobytes() for x, _ in pairs)
        right = error <= TOLERANCE[dtype]  # not if it is NaN
        wrong += not right
        hashed = hashlib.sha256(bits).hexdigest()[:16]
        print(hashed, f"{error:.1e}", name, "" if right else " WRONG: values")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
