"""The scans, their steps and layers under every transform of PyTorch, and under every pair of them.

Against the reference, which is a plain loop that PyTorch differentiates itself.
"""

from __future__ import annotations

import pytest
import torch
from scans import reference
from torch import Tensor
from torch.autograd import forward_ad
from transforms import ALL, COMPILED, QUICK, Composition, Function, clean_up, compositions

import msrnn_ops as ms

GENERATOR = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=GENERATOR).unbind()
RESETS = torch.tensor([[False, False, True]])
ENDS = torch.tensor([0, 2, 3])
LAYER = ms.nn.MinLSTM(2, 2, 2, batch_first=True, bidirectional=True).double()
BLOCK = ms.nn.MinRNNBlock(2, conv=2, mlp=1).double()

FUNCTIONS: dict[str, Function] = {
    "min_gru": lambda x: ms.min_gru(x, x.sin() + OTHER, x[:, 0], resets=RESETS),
    "linear_scan": lambda x: ms.linear_scan(x, x, OTHER[:, 0], reverse=True),
    "decay_scan": lambda x: ms.decay_scan(x, OTHER, x[:, 1]),
    "log_scan": lambda x: ms.log_scan(x, x + OTHER, reverse=True),
    "min_lstm": lambda x: ms.min_lstm(x, OTHER, x, activation="identity"),
    "min_gru_joint": lambda x: ms.min_gru_joint(torch.cat([x, OTHER * x], -1), resets=RESETS),
    "min_lstm_joint": lambda x: ms.min_lstm_joint(torch.cat([x, OTHER, x], -1)),
    "last": lambda x: ms.min_gru(OTHER, x, return_state=True)[1],
    "min_gru_step": lambda x: ms.min_gru_step(x[:, 0], x[:, 1], x[:, 2]),
    "min_lstm_step": lambda x: ms.min_lstm_step(x[:, 0], OTHER[:, 0], x[:, 1], x[:, 2]),
    "complex": lambda x: ms.linear_scan(torch.complex(x, OTHER), torch.complex(OTHER, x)).imag,
    "layer": lambda x: 5 * LAYER(2 * x)[0],
    "block": lambda x: BLOCK(x, resets=RESETS),
}
# All compositions with one function, the most telling with each.
CASES = [*((name, case) for name in FUNCTIONS for case in QUICK)]
CASES += [("min_gru", case) for case in ALL]


def by_the_reference(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        with reference():
            return f(x)

    return run


@pytest.mark.parametrize(("name", "case"), dict.fromkeys(CASES), ids=str)
def test_derivatives(name: str, case: Composition) -> None:
    f = FUNCTIONS[name]
    case.check(f, by_the_reference(f), X)


@pytest.mark.slow
@compositions([case for case in COMPILED if len(case.names) == 2 and case.names[1] != "dual"])
def test_derivatives_and_compile(composition: Composition) -> None:
    """Inside and around a compiled function."""

    def f(x: Tensor) -> Tensor:
        return ms.min_gru(x, x.sin() + OTHER)

    composition.check(f, by_the_reference(f), X)


def test_a_dual_level_in_a_compiled_function() -> None:
    """An error that says what to use: torch.compile enters the level behind autograd."""

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            h = ms.min_gru(forward_ad.make_dual(x, torch.ones_like(x)), x)
            return forward_ad.unpack_dual(h).tangent

    try:
        with pytest.raises(Exception, match="min_gru: expected forward mode in a compiled"):
            run(X)
    finally:  # torch.compile has left its own level open
        clean_up()


@pytest.mark.parametrize(
    "transform", ["jvp", "grad", "dual", "create_graph", "jacrev", "jacfwd", "vmap", "vmap-last"]
)
@pytest.mark.parametrize("op", [ms.min_gru, ms.decay_scan, ms.log_scan], ids=lambda op: op.__name__)
def test_packed_sequences_and_steps_outside(op: Function, transform: str) -> None:
    """Twice each, with NaN where no sequence is."""
    ends = torch.tensor([1, 3, 3, 6])
    outside = torch.full((1, 1, 2), torch.nan, dtype=torch.float64)

    def packed(x: Tensor) -> Tensor:
        x = torch.cat([outside, x.repeat(1, 2, 1)[:, :5], outside], 1)
        h, last = op(x, x, cu_seqlens=ends, return_state=True)
        return torch.cat([h, last[None]], 1).nan_to_num(neginf=-9.0)  # log_scan from log 0

    def plain(x: Tensor) -> Tensor:
        x = x.repeat(1, 2, 1)[:, :5]
        parts = [x[:, :2], x[:, :0], x[:, 2:]]
        with reference():
            found = [op(part, part, return_state=True) for part in parts]
        zero = torch.zeros_like(outside)
        found = [*(h for h, _ in found), zero, *(s[None] for _, s in found)]
        return torch.cat([zero, *found], 1).nan_to_num(neginf=-9.0)

    for names in ((transform,), (transform, transform)):
        if transform == "dual" and len(names) == 2:
            continue  # which PyTorch refuses
        Composition(names).check(packed, plain, X)
