"""Which implementation computes an op, and why another one does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from msrnn_ops import _C

_NAMES = ("cuda", "triton", "cpu", "reference")

# What `use_backend` chose: None lets the device decide.
_chosen: str | None = None


def backends() -> dict[str, str]:
    """State of every backend: ``"ok"``, or the reason why it cannot be used here.

    >>> import msrnn_ops as ms
    >>> ms.backends()["cpu"]
    'ok'
    """
    return {
        "cuda": _cuda(),
        "triton": "not built: this version has no Triton kernels",
        "cpu": "ok",
        "reference": "ok",
    }


def load_libraries() -> None:
    """Registers the operators: the CPU's, and those for CUDA where they were built."""
    folder = Path(__file__).parent
    libraries = list(folder.glob("_cpu*.so"))
    if not libraries:
        raise ImportError(
            "msrnn_ops has not been built here: run `pip install -e . --no-build-isolation` in the "
            "source tree, or start Python outside of it to use an installed package"
        )
    for library in (*libraries, *folder.glob("_cuda*.so")):
        torch.ops.load_library(library)


@cache
def _cuda() -> str:
    if _C.build_info()["cuda"] is None:
        return "not built: install where torch has CUDA and nvcc is found, or with FORCE_CUDA=1"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return "ok"


def chosen() -> str | None:
    return _chosen


def _validated(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"expected a backend among {', '.join(_NAMES)}, got {name!r}")
    state = backends()[name]
    if state != "ok":
        raise ValueError(f"backend {name!r} cannot be used: {state}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute the ops called in this block with one backend, whatever their device.

    The choice is recorded by each call: a backward pass outside of the block uses it too. It holds
    for the whole process. ``MSRNN_BACKEND=name`` in the environment sets it from the start.

    Args:
        name: ``"reference"`` (plain PyTorch, slow, any device), ``"cpu"``, ``"cuda"`` or
            ``"triton"``.

    Raises:
        ValueError: the name is unknown, or that backend cannot be used here.

    >>> import torch, msrnn_ops as ms
    >>> gate, candidate = torch.randn(2, 1, 5, 3)
    >>> with ms.use_backend("reference"):
    ...     h = ms.min_gru(gate, candidate)
    >>> torch.allclose(h, ms.min_gru(gate, candidate), atol=1e-6)
    True
    """
    global _chosen
    before, _chosen = _chosen, _validated(name)
    try:
        yield
    finally:
        _chosen = before


def require_device(op: str, device: torch.device, *served: str) -> None:
    """Raise unless a kernel serves this device (meta and fake tensors need none).

    ``served`` are the devices besides the CPU for which this version has kernels of the op.
    """
    if device.type in ("cpu", "meta"):
        return
    reason = backends()[device.type] if device.type in served else "no such kernels"
    if reason == "ok":
        return
    raise ValueError(
        f"{op}: expected tensors on cpu, got {device} ({reason}); "
        "msrnn_ops.use_backend('reference') computes on any device with plain PyTorch"
    )


if os.environ.get("MSRNN_BACKEND"):
    _chosen = _validated(os.environ["MSRNN_BACKEND"])
