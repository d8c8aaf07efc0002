"""What else computes the ops on a GPU: PyTorch's own means, accelerated-scan and HGRN's kernels.

The last two are measured where they are installed; the project does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

import msrnn_ops as ms
from bench import peers
from bench.peers import Function, Op

_LONGEST_GENERIC = 8192  # steps; compiling takes minutes beyond


def associative(op: Op) -> Function:
    """PyTorch's parallel scan: as a Triton kernel, or as plain operations where that fails."""
    tries = [
        torch.compile(peers.associative(op, mode), dynamic=False)
        for mode in ("pointwise", "generic")
    ]

    def call(*inputs: Tensor) -> Tensor:
        try:
            return tries[0](*inputs)
        except Exception:
            if len(tries) == 1 or inputs[0].shape[1] > _LONGEST_GENERIC:
                raise
            tries.pop(0)
            return tries[0](*inputs)

    return call


def _accelerated(*modules: str) -> Callable[[Op], Function]:
    """accelerated-scan, of the first module that this version of it has."""

    def make(op: Op) -> Function:
        names = [f"accelerated_scan.{module}" for module in modules]
        found = next((name for name in names if find_spec(name)), names[0])
        scan: Function = import_module(found).scan
        return scan

    return make


def _hgrn(name: str) -> Callable[[Op], Function]:
    def make(op: Op) -> Function:
        function = getattr(import_module("fla.ops.hgrn"), name)
        return lambda log_a, b: function(b, log_a)[0]

    return make


def _by_triton(op: Op) -> Function:
    call = peers.ours(op)

    def chosen(*inputs: Tensor) -> Tensor:
        with ms.use_backend("triton"):
            return call(*inputs)

    return chosen


@dataclass(frozen=True)
class Competitor:
    make: Callable[[Op], Function]
    ops: tuple[str, ...]  # of the default run
    every_op: bool = False  # can compute the others too
    package: str = "torch"
    time_last: bool = False  # takes (B, D, T)


OURS = peers.OURS
TRITON = "msrnn_ops, Triton"
COMPETITORS = {
    OURS: Competitor(peers.ours, tuple(peers.OPS)),
    TRITON: Competitor(_by_triton, tuple(peers.OPS), package="triton"),
    peers.HEINSEN: Competitor(peers.heinsen, ("min_gru",), every_op=True),
    peers.HEINSEN_COMPILED: Competitor(
        peers.COMPETITORS[peers.HEINSEN_COMPILED], ("min_gru",), every_op=True
    ),
    peers.ASSOCIATIVE_COMPILED: Competitor(associative, ("min_gru",), every_op=True),
    "accelerated-scan warp": Competitor(
        _accelerated("warp"), ("linear_scan",), package="accelerated_scan", time_last=True
    ),
    "accelerated-scan Triton": Competitor(
        _accelerated("triton", "scalar"),
        ("linear_scan",),
        package="accelerated_scan",
        time_last=True,
    ),
    "HGRN chunk": Competitor(_hgrn("chunk_hgrn"), ("decay_scan",), package="fla"),
    "HGRN recurrent": Competitor(_hgrn("fused_recurrent_hgrn"), ("decay_scan",), package="fla"),
}


def own() -> list[str]:
    """Ours by both backends, where Triton is one more."""
    states = ms.backends()
    both = states["cuda"] == states["triton"] == "ok"
    return [OURS, TRITON] if both else [OURS]


def competitors(op: Op, *, large: bool, full: bool) -> list[str]:
    """Ours, and at large shapes what is installed and computes this op."""
    names = [OURS]
    for name, peer in COMPETITORS.items():
        wanted = op.name in peer.ops or (full and peer.every_op)
        if "Heinsen" in name and op.logarithms is None:
            continue
        if name not in (OURS, TRITON) and (large or full) and wanted and find_spec(peer.package):
            names.append(name)
    return names


def inputs_of(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs in the layout of a competitor."""
    if not COMPETITORS[name].time_last:
        return inputs
    return tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs)


def layout_of(name: str, x: Tensor) -> Tensor:
    """A tensor (B, T, D) in the layout of a competitor, or one of its own as (B, T, D)."""
    return x.transpose(1, 2).contiguous() if COMPETITORS[name].time_last else x
