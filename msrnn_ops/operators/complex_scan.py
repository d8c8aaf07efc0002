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

from dataclasses import replace

import torch
from torch import Tensor

from msrnn_ops import backend
from msrnn_ops.operators.scan import LINEAR, OPERATORS, Borders, Call, Operator

COMPLEX_LINEAR = replace(LINEAR, name="complex_linear_scan")


class ComplexLinear:
    """The operator in one namespace, from the real one."""

    def __init__(self, namespace: str) -> None:
        self.real = OPERATORS[namespace, LINEAR.name].forward
        library, name = backend.LIBRARIES[namespace], COMPLEX_LINEAR.name
        library.impl(name, self.forward, "CompositeExplicitAutograd")
        library.impl(f"{name}_backward", self.backward, "CompositeExplicitAutograd")
        self.operator = Operator(COMPLEX_LINEAR, namespace)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        angle = a.angle().double().nan_to_num(0.0)  # a NaN stays in the modulus, and its sequence
        phase = angle.flip(1).cumsum(1).flip(1) if reverse else angle.cumsum(1)
        turn = torch.polar(torch.ones_like(phase), phase).to(a.dtype)
        borders = Borders(b, cu_seqlens, None, reverse)
        if h0 is not None and a.shape[1]:
            entry = (borders.row, borders.entry)
            before = torch.where(borders.empty, 0.0, phase[entry] - angle[entry])
            h0 = h0 * torch.polar(torch.ones_like(before), -before).to(a.dtype)
        modulus, turned = a.abs(), b * turn.conj_physical()
        planes = [
            self.real(modulus, part(turned), state, cu_seqlens, resets, reverse)
            for part, state in (
                (torch.real, None if h0 is None else h0.real),
                (torch.imag, None if h0 is None else h0.imag),
            )
        ]
        h, last = (torch.complex(*pair) for pair in zip(*planes, strict=True))
        if a.shape[1]:
            last = torch.where(borders.empty, last, last * turn[borders.row, borders.exit])
        return (h * turn).contiguous(), last.contiguous()

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
        call = Call(self.operator, cu_seqlens, resets, reverse, ())
        grads = call.backward(grad_h, grad_last, (a,), h, h0)
        return tuple(x.contiguous() for x in grads)  # as the operator's fake says


for _namespace in backend.LIBRARIES:
    OPERATORS[_namespace, COMPLEX_LINEAR.name] = ComplexLinear(_namespace).operator
