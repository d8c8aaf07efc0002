"""Which kernels the tests run on: by default the CPU's; by the environment any others.

``MSRNN_TEST_KERNELS``: the library of tests/emulation, the CUDA kernels for CPU tensors.
``TRITON_INTERPRET=1`` with ``MSRNN_BACKEND=triton``: Triton's kernels on its interpreter.
``MSRNN_TEST_DEVICE=cuda``: a GPU.
"""

from __future__ import annotations

import os

import torch

from msrnn_ops import backend
from msrnn_ops.operators import multi_state

EMULATED = "MSRNN_TEST_KERNELS" in os.environ
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose() -> None:
    if INTERPRETED:
        import interpreter

        interpreter.repair()
    if EMULATED:
        torch.ops.load_library(os.environ["MSRNN_TEST_KERNELS"])
        for name, function in multi_state.ON_DEVICE.items():
            backend.LIBRARIES[backend.COMPILED].impl(name, function, "CPU", allow_override=True)
    if "MSRNN_TEST_DEVICE" in os.environ:
        torch.set_default_device(os.environ["MSRNN_TEST_DEVICE"])
