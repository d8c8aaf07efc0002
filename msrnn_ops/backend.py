"""Which implementation computes an op, and why another one does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        "cuda": "not built: this version has no CUDA kernels",
        "triton": "not built: this version has no Triton kernels",
        "cpu": "ok",
        "reference": "ok",
    }


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


def require_device(op: str, device: torch.device) -> None:
    """Raise unless a kernel serves this device (meta and fake tensors need none)."""
    if device.type in ("cpu", "meta"):
        return
    reason = backends().get(device.type, "no such kernels")
    raise ValueError(
        f"{op}: expected tensors on cpu, got {device} ({reason}); "
        "msrnn_ops.use_backend('reference') computes on any device with plain PyTorch"
    )


if os.environ.get("MSRNN_BACKEND"):
    _chosen = _validated(os.environ["MSRNN_BACKEND"])
