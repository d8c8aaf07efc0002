"""Which kernels the tests run on: by default the CPU's; by the environment any others.

``MSRNN_TEST_KERNELS``: a library of tests/emulation, the CUDA kernels for CPU tensors: their
source, or what nvcc made of it.
``TRITON_INTERPRET=1`` with ``MSRNN_BACKEND=triton``: Triton's kernels on its interpreter.
``MSRNN_TEST_TRITON=90``: Triton's kernels, compiled for sm_90 and run as PTX (emulation/ptx).
``MSRNN_TEST_DEVICE=cuda``: a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from msrnn_ops import backend
from msrnn_ops.operators import multi_state

EMULATED = "MSRNN_TEST_KERNELS" in os.environ
TRITON_ARCH = int(os.environ.get("MSRNN_TEST_TRITON", 0))
TRITON = TRITON_ARCH > 0 or os.environ.get("MSRNN_BACKEND") == "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or TRITON_ARCH > 0  # slow: small inputs


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """From the allocator of tensors, which the machine for PTX knows; else another serves."""
    made = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
    return made.copy_(storage)


def _compile_triton() -> None:
    """CPU tensors go to Triton's kernels as they do with its interpreter."""
    sys.path.append(str(Path(__file__).parent / "emulation/ptx"))
    backend._interpreted = lambda: True
    backend._triton.cache_clear()
    import interpreter
    import triton_driver

    interpreter.shrink_gpu()
    triton_driver.activate(TRITON_ARCH)
    torch.UntypedStorage.clone = _clone
    backend._chosen = "triton"


def choose() -> None:
    if TRITON_ARCH:
        _compile_triton()
    elif INTERPRETED:
        import interpreter

        interpreter.repair()
    if EMULATED:
        torch.ops.load_library(os.environ["MSRNN_TEST_KERNELS"])
        torch.UntypedStorage.clone = _clone
        for name, function in multi_state.ON_DEVICE.items():
            backend.LIBRARIES[backend.COMPILED].impl(name, function, "CPU", allow_override=True)
    if "MSRNN_TEST_DEVICE" in os.environ:
        torch.set_default_device(os.environ["MSRNN_TEST_DEVICE"])
