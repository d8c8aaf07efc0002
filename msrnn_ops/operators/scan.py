"""The scan operators as PyTorch sees them: fake tensors, autograd, forward mode, torch.func.

A :class:`Recurrence` describes an op of csrc/ops.cpp, an :class:`Operator` is that op in one
namespace, registered. The derivative of every recurrence h_t = a_t h_{t-1} + b_t has one shape.
With the adjoint

    s_t = grad_t + a_{t+1} s_{t+1}

(itself a scan, backwards) input i has the gradient s_t * factor_i, where factor_i is the derivative
of h_t in input i with h_{t-1} held fixed; and a tangent runs forward as

    dh_t = a_t dh_{t-1} + sum_i factor_i dx_i.

The backward kernels compute the adjoint and the gradients in one fused pass. The ``derivatives`` of
a recurrence return a and the factors as plain PyTorch, which gives second derivatives and forward
mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.nn.functional import softplus

from msrnn_ops import backend, errors, reference, transforms
from msrnn_ops.operators.in_place import InPlace, is_plain
from msrnn_ops.reference import accumulation_dtype


@dataclass(frozen=True)
class Recurrence:
    """An op of csrc/ops.cpp, whatever computes it."""

    name: str
    inputs: tuple[str, ...]
    # (inputs, h_{t-1}, *flags) -> (a_t, factors), differentiable.
    derivatives: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    step: Callable[..., Tensor]  # of reference.py
    parts: int = 1  # of a joint op: inputs side by side in one tensor
    flags: int = 0  # arguments after `reverse`
    saved: int | None = None  # leading inputs that backward reads; None: all
    start: float = 0.0  # the state where h0 is None, and after a reset

    def plain_step(
        self, inputs: tuple[Tensor, ...], h: Tensor, rows: Tensor, *flags: bool
    ) -> Tensor:
        """One token in place on rows of a larger state, by the reference."""
        step = partial(self.step, activation="identity" if flags[0] else "g")
        return reference.step_rows(step, inputs, h, rows)

    def plain(self, *args: Any) -> tuple[Tensor, Tensor]:
        """By the reference, with the arguments of the schema; differentiable by PyTorch itself."""
        n = len(self.inputs)
        h0, cu_seqlens, resets, reverse, *flags = args[n:]
        inputs = args[:n] if self.parts == 1 else args[0].chunk(self.parts, -1)
        step = (
            partial(self.step, activation="identity" if flags[0] else "g") if flags else self.step
        )
        return reference.scan(
            step, inputs, h0, start=self.start, reverse=reverse, cu_seqlens=cu_seqlens,
            resets=resets,
        )  # fmt: skip


# Derivatives, in the accumulation dtype.


def _linear_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return x[0], (before, torch.ones_like(before))


def _decay_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    a = x[0].exp()
    return a, (a * before, torch.ones_like(before))


def _log_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    from_state = x[0] + before
    dead = (from_state == -torch.inf) & (x[1] == -torch.inf)
    distance = torch.where(dead, 0.0, from_state) - torch.where(dead, 0.0, x[1])
    p = torch.where(dead, 0.0, torch.sigmoid(distance))
    q = torch.where(dead, 0.0, torch.sigmoid(-distance))
    return p, (p, q)


def _activation(x: Tensor, identity: bool) -> tuple[Tensor, Tensor]:
    if identity:
        return x, torch.ones_like(x)
    s = torch.sigmoid(x)
    return torch.where(x >= 0, x + 0.5, s), torch.where(x >= 0, 1.0, s * torch.sigmoid(-x))


def _gru_derivatives(
    x: Sequence[Tensor], before: Tensor, identity: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    a, z = torch.sigmoid(-x[0]), torch.sigmoid(x[0])
    value, slope = _activation(x[1], identity)
    return a, (a * z * (value - before), z * slope)


def _lstm_derivatives(
    x: Sequence[Tensor], before: Tensor, identity: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    forget, input, candidate = x
    distance = softplus(-forget) - softplus(-input)
    a, z = torch.sigmoid(-distance), torch.sigmoid(distance)
    value, slope = _activation(candidate, identity)
    common = a * z * (before - value)
    return a, (common * torch.sigmoid(-forget), -common * torch.sigmoid(-input), z * slope)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences, and so states, a call has: B, or N with cu_seqlens."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def borders(caller: str, cu_seqlens: Tensor, time: int) -> None:
    """For plain CPU tensors, whose values are known; elsewhere kernels stay in bounds for any."""
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or not cu_seqlens.is_cpu:
        return
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > time:
        got = f"{ends[0]} to {ends[-1]}"
        raise errors.value(caller, f"cu_seqlens within 0 to T = {time}", got)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < start:
            got = f"{start} and then {end} at index {i + 1}"
            raise errors.value(caller, "cu_seqlens not to decrease", got)


class Borders:
    """Which steps states enter and leave, in the direction of the scan, by cu_seqlens and resets.

    Masks are (B, T, 1), made of PyTorch's operations on any device, which nobody waits for.
    """

    def __init__(
        self, h: Tensor, cu_seqlens: Tensor | None, resets: Tensor | None, reverse: bool
    ) -> None:
        batch, time, _ = h.shape
        step = torch.arange(time, device=h.device)
        if cu_seqlens is None:
            start, end = step.new_zeros(batch), step.new_full((batch,), time)
            self.row = torch.arange(batch, device=h.device)
            sequence = self.row[:, None].expand(batch, time)
            covered = torch.ones_like(sequence, dtype=torch.bool)
        else:
            start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
            self.row = torch.zeros_like(start)
            sequence = torch.searchsorted(end.contiguous(), step, right=True)[None]
            covered = ((cu_seqlens[0] <= step) & (step < cu_seqlens[-1]))[None]
        self.sequence = sequence * covered
        self.empty = (start == end)[:, None]
        first, last = covered, covered
        if start.shape[0] and time:
            first = covered & (step == start[self.sequence])
            last = covered & (step == end[self.sequence] - 1)
        before = torch.zeros_like(first) if resets is None else resets & ~first
        behind = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], 1)
        unused = torch.zeros_like(first) if resets is None else resets & first
        if reverse:
            first, last, before, behind = last, first, behind, before
            unused = torch.zeros_like(first)
        # Where the scan starts a sequence, from its initial state or, where a reset says so, not
        # from it; where a reset lies before a step, or behind it; and where a sequence ends.
        self.enters, self.leaves = (first & ~unused)[..., None], last[..., None]
        self.afresh, self.cut = (before | unused)[..., None], behind[..., None]
        self.covered = covered[..., None]
        self.inner = None if resets is None else resets & ~(last if reverse else first)
        start, end = (x.clamp(0, max(time - 1, 0)) for x in (start, end - 1))
        self.entry, self.exit = (end, start) if reverse else (start, end)


def _shift(x: Tensor, edge: Tensor, reverse: bool) -> Tensor:
    """The value of the step before, `edge` (B, D) before the first one."""
    edge = edge.unsqueeze(1)
    return torch.cat([x[:, 1:], edge] if reverse else [edge, x[:, :-1]], 1) if x.shape[1] else x


@dataclass(frozen=True)
class Call:
    """The arguments of a call that are not differentiated, and its derivatives in plain PyTorch."""

    operator: Operator
    cu_seqlens: Tensor | None
    resets: Tensor | None
    reverse: bool
    flags: tuple[bool, ...]

    def borders(self, h: Tensor) -> Borders | None:
        if self.cu_seqlens is None and self.resets is None:
            return None
        return Borders(h, self.cu_seqlens, self.resets, self.reverse)

    def linear_scan(
        self, a: Tensor, b: Tensor, h0: Tensor | None, resets: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """By the kernels of the same namespace; it can be differentiated again."""
        if transforms.batched_outside_of_autograd(a, b, h0):
            return self.operator.linear.recurrence.plain(a, b, h0, self.cu_seqlens, resets, reverse)
        return self.operator.linear(a, b, h0, self.cu_seqlens, resets, reverse)

    def factors(
        self, inputs: Sequence[Tensor], h: Tensor, h0: Tensor | None, borders: Borders | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """a and the factors of every step (see the head of this file)."""
        recurrence, h = self.operator.recurrence, _wide(h)
        if recurrence.parts > 1:
            inputs = inputs[0].chunk(recurrence.parts, -1)
        inputs = [_wide(x) for x in inputs]
        nothing = h.new_full((h.shape[0], h.shape[2]), recurrence.start)
        if borders is None:
            before = _shift(h, nothing if h0 is None else h0, self.reverse)
        else:  # what lies outside may be NaN, and 0 times NaN is no 0
            inputs = [torch.where(borders.covered, x, 0.0) for x in inputs]
            before = torch.where(borders.afresh, recurrence.start, _shift(h, nothing, self.reverse))
            entering = recurrence.start if h0 is None else h0[borders.sequence]
            if h0 is None or h0.shape[0]:
                before = torch.where(borders.enters, entering, before)
        return recurrence.derivatives(inputs, before, *self.flags)

    def backward(
        self,
        grad_h: Tensor | None,
        grad_last: Tensor | None,
        inputs: Sequence[Tensor],
        h: Tensor,
        h0: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """What the backward kernel computes, from operations that are differentiable again."""
        borders = self.borders(h)
        a, factors = self.factors(inputs, h, h0, borders)
        # Of complex numbers. A lazy .conj() is lost in an operator that a compiled graph calls.
        a, factors = a.conj_physical(), tuple(factor.conj_physical() for factor in factors)
        grad = torch.zeros_like(a) if grad_h is None else _wide(grad_h)
        if grad_last is None:
            grad_last = a.new_zeros(sequences_of(h, self.cu_seqlens), h.shape[2])
        later = _shift(a, torch.ones_like(a[:, 0]) if a.shape[1] else grad_last, not self.reverse)
        resets = None
        if borders is not None:
            grad, resets = torch.where(borders.covered, grad, 0.0), borders.inner
            later = torch.where(borders.leaves, 1.0, torch.where(borders.cut, 0.0, later))
        s, _ = self.linear_scan(later, grad, grad_last, resets, not self.reverse)
        carried = a * s
        if not a.shape[1]:
            grad_h0 = grad_last
        elif borders is None:
            grad_h0 = carried[:, -1 if self.reverse else 0]
        else:
            place = (borders.row, borders.entry)
            grad_h0 = torch.where(borders.enters[place], carried[place], 0.0)
            grad_h0 = torch.where(borders.empty, grad_last, grad_h0)
        grads = tuple((s * factor).to(h.dtype) for factor in factors)
        if self.operator.recurrence.parts > 1:
            grads = (torch.cat(grads, -1),)
        return *grads, grad_h0

    def tangent(
        self,
        tangents: Sequence[Tensor | None],
        tangent_h0: Tensor | None,
        inputs: Sequence[Tensor],
        h: Tensor,
        h0: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        borders = self.borders(h)
        a, factors = self.factors(inputs, h, h0, borders)
        parts = self.operator.recurrence.parts
        if parts > 1 and tangents[0] is not None:
            tangents = tangents[0].chunk(parts, -1)
        b = torch.zeros_like(a)
        for factor, tangent in zip(factors, tangents, strict=False):
            if tangent is not None:
                b = b + factor * tangent
        if borders is not None:
            b = torch.where(borders.covered, b, 0.0)
        dh, last = self.linear_scan(a, b, tangent_h0, self.resets, self.reverse)
        return dh.to(h.dtype), last


def _straight(kernel: Any, args: tuple[Any, ...], like: Tensor) -> Any:
    """What an operator computes, by the shortest way that its tensors allow."""
    if like.is_cpu or like.is_cuda:
        for x in args:
            if isinstance(x, Tensor) and (type(x) is not Tensor or x.is_neg()):
                break
        else:
            return backend.of_device(kernel, args, like.is_cpu)
    return backend.below_autograd(kernel, args)


class ScanFunction(torch.autograd.Function):
    """Any scan: its arguments are an :class:`Operator` and what that operator takes."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return backend.below_autograd(args[0].forward, args[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        operator = inputs[0]
        h0, cu_seqlens, resets, reverse, *flags = inputs[1 + operator.inputs :]
        tensors = (*inputs[1 : 1 + operator.saved], output[0], h0, cu_seqlens, resets)
        ctx.save_for_backward(*tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors)
        ctx.call = (operator, reverse, tuple(flags))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None) -> Any:
        operator, reverse, flags = ctx.call
        no_gradient = (None,) * (3 + len(flags))  # of cu_seqlens, resets, reverse and the flags
        if grad_h is None and grad_last is None:
            return (None,) * (operator.inputs + 2) + no_gradient
        *inputs, h, h0, cu_seqlens, resets = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = Call(operator, cu_seqlens, resets, reverse, flags)
            *grads, grad_h0 = call.backward(grad_h, grad_last, inputs, h, h0)
        else:
            rest = (*inputs, h, h0, cu_seqlens, resets, reverse, *flags)
            args = (grad_h, grad_last, *rest)
            try:
                if is_plain():
                    *grads, grad_h0 = _straight(operator.backward, args, h)
                else:
                    *grads, grad_h0 = operator.backward(*args)
            except RuntimeError as error:
                raise errors.of_torch(error) from None
        return None, *grads, None if h0 is None else grad_h0, *no_gradient

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Tensor, Tensor]:
        *inputs, h, h0, cu_seqlens, resets = ctx.saved_tensors
        operator, reverse, flags = ctx.call
        n = operator.inputs
        call = Call(operator, cu_seqlens, resets, reverse, flags)
        return call.tangent(tangents[:n], tangents[n], inputs, h, h0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operator: Operator, *args: Any) -> Any:
        """The batch becomes rows or, where the rows are sequences behind each other, channels."""
        n, size = operator.inputs, info.batch_size
        packed = args[n + 1] is not None

        def lead(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

        def beside(x: Tensor | None, parts: int) -> Tensor | None:
            if x is None:
                return None
            channels = x.shape[-1] // parts
            x = x.unflatten(-1, (parts, channels)).movedim(0, -2)
            return x.reshape(*x.shape[:-3], parts * size * channels)

        *led, resets = (lead(args[i], in_dims[1 + i]) for i in (*range(n + 1), n + 2))
        if not packed:
            folded = [x if x is None else x.flatten(0, 1) for x in (*led, resets)]
            given = (*folded[:-1], None, folded[-1], *args[n + 3 :])
            h, last = operator.function.apply(operator, *given)
            return (h.unflatten(0, (size, -1)), last.unflatten(0, (size, -1))), (0, 0)
        if in_dims[n + 3] is not None:
            name = operator.recurrence.name
            expected = "the same resets for the whole batch of torch.vmap, with cu_seqlens"
            raise errors.value(name, expected, "others for each element")
        parts = operator.recurrence.parts
        inputs = [beside(x, parts) for x in led[:-1]]
        found = operator.function.apply(operator, *inputs, beside(led[-1], 1), *args[n + 1 :])
        channels = found[0].shape[-1] // size
        return tuple(x.unflatten(-1, (size, channels)) for x in found), (2, 1)


class Operator:
    """A recurrence in one namespace: its kernels, and what is registered around them."""

    def __init__(
        self, recurrence: Recurrence, namespace: str, linear: Operator | None = None
    ) -> None:
        """``linear`` is the scan that derivatives are made of; None: this one."""
        name = recurrence.name
        self.recurrence, self.namespace = recurrence, namespace
        self.inputs = len(recurrence.inputs)
        self.saved = self.inputs if recurrence.saved is None else recurrence.saved
        self.linear = self if linear is None else linear
        self.forward = getattr(getattr(torch.ops, namespace), name).default
        self.backward = getattr(getattr(torch.ops, namespace), f"{name}_backward").default
        # A class of its own, whose name stands in graphs and in the messages of autograd.
        self.function: Any = type(f"{name}_function", (ScanFunction,), {})
        # Its apply without the Python of torch.autograd.Function, which binds the arguments to the
        # signature of `forward` for torch.func: a third of the time of a small call.
        self._record: Any = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        torch.library.register_fake(f"{namespace}::{name}", self._fake)
        torch.library.register_fake(f"{namespace}::{name}_backward", self._fake_backward)
        backend.LIBRARIES[namespace].impl(name, self._dispatched, "Autograd")

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        """h and the last states. In eager mode there is no way through the dispatcher.

        The arguments are those of the schema: inputs, h0, cu_seqlens, resets, reverse, flags.
        """
        if torch.compiler.is_compiling():
            return self.forward(*args)
        if torch._C._are_functorch_transforms_active():
            if transforms.nested_forward_mode():
                return self.recurrence.plain(*args)
            return self.function.apply(self, *args)
        return self.eager(*args)

    def eager(self, *args: Any) -> tuple[Tensor, Tensor]:
        """A call outside of torch.func and of compilation."""
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if needed or forward_ad._current_level >= 0:
            if torch._C._is_tracing():  # the operator goes into the trace, not a Python function
                return self.forward(*args)
            if torch._C._are_functorch_transforms_active():
                return self.function.apply(self, *args)
            return self._record(self, *unwrap_dead_wrappers(args))
        return _straight(self.forward, args, args[0])

    def _dispatched(self, *args: Any) -> tuple[Tensor, Tensor]:
        """By the dispatcher: compiled, exported, traced or called directly."""
        transforms.refuse_lost_tangents(self.recurrence.name, args)
        return self.eager(*args)

    def _fake(self, *args: Any) -> tuple[Tensor, Tensor]:
        x, cu_seqlens = args[0], args[self.inputs + 1]
        batch, time, channels = x.shape[0], x.shape[1], x.shape[2] // self.recurrence.parts
        states = sequences_of(x, cu_seqlens), channels
        last = x.new_empty(states, dtype=accumulation_dtype(x.dtype))
        return x.new_empty((batch, time, channels)), last

    def _fake_backward(self, grad_h: Tensor | None, grad_last: Tensor | None, *args: Any) -> Any:
        h, cu_seqlens = args[self.saved], args[self.saved + 2]
        states = sequences_of(h, cu_seqlens), h.shape[2]
        grad_h0 = h.new_empty(states, dtype=accumulation_dtype(h.dtype))
        return *(args[0].new_empty(args[0].shape) for _ in range(self.inputs)), grad_h0


LINEAR = Recurrence("linear_scan", ("a", "b"), _linear_derivatives, reference.linear_step, saved=1)
DECAY = Recurrence("decay_scan", ("log_a", "b"), _decay_derivatives, reference.decay_step, saved=1)
LOG = Recurrence(
    "log_scan", ("log_a", "log_b"), _log_derivatives, reference.log_step, start=-torch.inf
)
MIN_GRU = Recurrence(
    "min_gru", ("gate", "candidate"), _gru_derivatives, reference.min_gru_step, flags=1
)
MIN_LSTM = Recurrence(
    "min_lstm",
    ("forget", "input", "candidate"),
    _lstm_derivatives,
    reference.min_lstm_step,
    flags=1,
)
MIN_GRU_JOINT = replace(MIN_GRU, name="min_gru_joint", inputs=("projection",), parts=2)
MIN_LSTM_JOINT = replace(MIN_LSTM, name="min_lstm_joint", inputs=("projection",), parts=3)
RECURRENCES = (LINEAR, DECAY, LOG, MIN_GRU, MIN_GRU_JOINT, MIN_LSTM, MIN_LSTM_JOINT)

backend.implement_by_triton(
    "scan", [name for op in RECURRENCES for name in (op.name, f"{op.name}_backward")]
)
OPERATORS: dict[tuple[str, str], Operator] = {}
for _namespace in backend.LIBRARIES:
    for _recurrence in RECURRENCES:  # the linear scan first, which the others' derivatives use
        _linear = OPERATORS.get((_namespace, LINEAR.name))
        OPERATORS[_namespace, _recurrence.name] = Operator(_recurrence, _namespace, _linear)

# One token in place on rows of a larger state: min_gru_step and min_lstm_step with rows.
STEPS: dict[tuple[str, str], InPlace] = {}
backend.implement_by_triton("scan", [f"{op.name}_step" for op in (MIN_GRU, MIN_LSTM)])
for _namespace in backend.LIBRARIES:
    for _recurrence in (MIN_GRU, MIN_LSTM):
        _name = f"{_recurrence.name}_step"
        torch.library.register_fake(
            f"{_namespace}::{_name}",
            lambda x, *rest: x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype)),
        )
        STEPS[_namespace, _recurrence.name] = InPlace(
            _namespace, _name, f"msrnn_ops.{_name} without rows"
        )
