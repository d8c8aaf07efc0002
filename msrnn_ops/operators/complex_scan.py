"""linear_scan of complex numbers, by the kernels of the real one.

With a_t = r_t e^{i theta_t} and the phase Phi_t = theta_1 + ... + theta_t, the state turned back by
its phase, g_t = h_t e^{-i Phi_t}, has a real decay:

    g_t = r_t g_{t-1} + b_t e^{-i Phi_t}.

So the real and the imaginary part of g are a real scan each. Phases are summed in float64, which
leaves 3e-10 of an angle after a million steps. Backward and forward mode are those of every other
scan (scan.py), conjugated where a gradient asks for it. A kernel of complex numbers would move a
third of the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msrnn_ops import backend, transforms
from msrnn_ops.operators.scan import LINEAR, OPERATORS, Borders, Call, ScanFunction

_PHASE = torch.float64


class ComplexLinear:
    """What :class:`msrnn_ops.operators.scan.Operator` is for real numbers."""

    recurrence, inputs, saved = LINEAR, 2, LINEAR.saved
    function: Any = type("complex_linear_scan_function", (ScanFunction,), {})

    def __init__(self, namespace: str) -> None:
        self.real = OPERATORS[namespace, LINEAR.name].forward
        self.linear = self

    # torch.compile would trace the backward pass through angles, which have none at a = 0.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        if transforms.nested_forward_mode():
            return self.recurrence.plain(*args)
        return self.function.apply(self, *args)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        angle = a.angle().to(_PHASE).nan_to_num(0.0)  # a NaN stays in the modulus, and its sequence
        phase = angle.flip(1).cumsum(1).flip(1) if reverse else angle.cumsum(1)
        turn = torch.polar(torch.ones_like(phase), phase).to(a.dtype)
        borders = Borders(b, cu_seqlens, None, reverse)
        if h0 is not None and a.shape[1]:
            entry = (borders.row, borders.entry)
            before = torch.where(borders.empty, 0.0, phase[entry] - angle[entry])
            h0 = h0 * torch.polar(torch.ones_like(before), -before).to(a.dtype)
        modulus, turned = a.abs(), b * turn.conj()
        planes = [
            self.real(
                modulus, part(turned), h0 if h0 is None else part(h0), cu_seqlens, resets, reverse
            )
            for part in (torch.real, torch.imag)
        ]
        h, last = (torch.complex(*pair) for pair in zip(*planes, strict=True))
        if a.shape[1]:
            last = torch.where(borders.empty, last, last * turn[borders.row, borders.exit])
        return h * turn, last

    def backward(
        self,
        grad_h: Tensor | None,
        grad_last: Tensor | None,
        a: Tensor,
        h: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        call = Call(self, cu_seqlens, resets, reverse, ())
        return call.backward(grad_h, grad_last, (a,), h, h0)


COMPLEX_LINEAR = {namespace: ComplexLinear(namespace) for namespace in backend.LIBRARIES}
