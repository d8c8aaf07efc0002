"""A linear layer and its scan with time in chunks: what lies between them exists for one chunk.

Of min_gru_layer(x, weight, bias) the forward keeps h and the state between two chunks; x is there
anyway. Backward walks the chunks the other way round, computes the projection of each again, and
adds up the gradients of the weights:

    for each chunk:  p = x W^T + b;   grad_p, grad_state = backward of the joint op(p, h, state)
                     grad_x = grad_p W;   grad_W += grad_p^T x

So x, h and their gradients are all that has the length of time, where projection and its gradient
would add twice two tensors for minGRU and twice three for minLSTM. The price is one matrix product
of four more, and a chunk that stays in cache pays a part of it back.

States cross the border of two chunks as they cross that of two calls. With cu_seqlens a chunk sees
its part of them, and all sequences but one lie on one side of a border; so one state is kept,
whatever their number. On a CPU a chunk is given the sequences that meet it, elsewhere all of them:
nobody waits for their borders there. Second derivatives are those of the whole layer.
"""

from __future__ import annotations

import bisect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from msrnn_ops import backend, errors, transforms
from msrnn_ops.operators.scan import (
    MIN_GRU_JOINT,
    MIN_LSTM_JOINT,
    OPERATORS,
    Recurrence,
    borders,
    sequences_of,
)
from msrnn_ops.reference import accumulation_dtype

# The pre-activations of a step that leaves the state as it is: sigma(-1e4) is 0.
_IDLE = {MIN_GRU_JOINT.name: (-1e4, 0.0), MIN_LSTM_JOINT.name: (1e4, -1e4, 0.0)}


def idle(op: Recurrence, projection: Tensor, real: Tensor) -> Tensor:
    """A projection (B, T, parts * D) whose steps that are not ``real`` (B, T, 1) change nothing."""
    channels = projection.shape[-1] // op.parts
    # Filled on the device: a copy of a list would wait for it, and no graph captures that.
    parts = [projection.new_full((channels,), gate) for gate in _IDLE[op.name]]
    return torch.where(real, projection, torch.cat(parts))


def _own_dtype(x: Tensor) -> AbstractContextManager[None]:
    """No autocast: a layer has cast before, and backward repeats what forward did anywhere."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _add_product(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """total += rows @ columns, summed in the dtype of the total."""
    if rows.dtype == total.dtype:
        total.addmm_(rows, columns)
    elif rows.is_cuda:
        total += torch.mm(rows, columns, out_dtype=total.dtype)
    else:
        total.addmm_(rows.to(total.dtype), columns.to(total.dtype))


class _Arguments(NamedTuple):
    """Of an operator, in the order of its schema (csrc/ops.cpp)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None
    cu_seqlens: Tensor | None
    resets: Tensor | None
    real: Tensor | None
    reverse: bool
    identity: bool
    chunk: int


class _Chunks:
    """Time in the direction of the scan, and the sequences that meet each part of it."""

    def __init__(self, given: _Arguments) -> None:
        time, chunk, cu_seqlens = given.x.shape[1], given.chunk, given.cu_seqlens
        self.cu_seqlens, self.resets, self.reverse = cu_seqlens, given.resets, given.reverse
        self._identity = given.identity
        parts = [slice(t, min(t + chunk, time)) for t in range(0, max(time, 1), chunk)]
        self.parts = parts[::-1] if self.reverse else parts
        self._ends: list[int] | None = None
        if cu_seqlens is not None and cu_seqlens.is_cpu:  # another device would be waited for
            self._ends = cu_seqlens.tolist()

    def rows(self, part: slice) -> slice:
        """The sequences that meet a part, and maybe more; of a batch: all."""
        if self.cu_seqlens is None or self._ends is None:
            return slice(None)
        first = bisect.bisect_right(self._ends, part.start, 1) - 1
        after = bisect.bisect_left(self._ends, part.stop, 0, len(self._ends) - 1)
        return slice(first, max(first, after))

    def _ends_of(self, part: slice) -> tuple[Tensor, Tensor]:
        assert self.cu_seqlens is not None
        rows = self.rows(part)
        return self.cu_seqlens[:-1][rows], self.cu_seqlens[1:][rows]

    def options(self, part: slice) -> tuple[Tensor | None, Tensor | None, bool, bool]:
        """What the joint op takes of a part behind its state: cu_seqlens, resets and the flags."""
        ends, rows = self.cu_seqlens, self.rows(part)
        if ends is not None:
            if rows.stop is not None:
                ends = ends[rows.start : rows.stop + 1]
            ends = (ends - part.start).clamp(0, part.stop - part.start)
        resets = None if self.resets is None else self.resets[:, part]
        return ends, resets, self.reverse, self._identity

    def crossing(self, part: slice, border: int) -> Tensor | None:
        """Which of a part's rows go on behind a border of it, (rows, 1); None: all."""
        if self.cu_seqlens is None:
            return None
        start, end = self._ends_of(part)
        return ((start < border) & (border < end))[:, None]

    def cut(self, state: Tensor, part: slice) -> Tensor:
        """A state, or its gradient, that a reset on the border keeps from entering a part.

        Forward the scan itself sees to it: the border is that before the first step of the part.
        """
        if self.resets is None or not self.reverse or part == self.parts[0]:
            return state
        cut, crossing = self.resets[:, part.stop, None], self.crossing(part, part.stop)
        return torch.where(cut if crossing is None else cut & crossing, 0.0, state)

    def behind(self, part: slice) -> int:
        """The border at which the scan leaves a part."""
        return part.start if self.reverse else part.stop


class ChunkedFunction(torch.autograd.Function):
    """Its arguments are a :class:`ChunkedLayer` and what that operator takes."""

    @staticmethod
    def forward(operator: ChunkedLayer, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backend.below_autograd(operator.forward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operator, *tensors, reverse, identity, chunk = inputs
        h, _, states = output
        ctx.save_for_backward(*tensors, h, states)
        ctx.call = (operator, reverse, identity, chunk)
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None, _: None) -> Any:
        operator, *options = ctx.call
        if grad_h is None and grad_last is None:
            return (None,) * 11
        nothing = (None,) * 6  # cu_seqlens, masks and options
        x, weight, bias, h0, *masks, h, states = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, needs_h0, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            needed = (needs_x, needs_weight, needs_bias, needs_h0)
            given, grads = (grad_h, grad_last), operator.whole_backward
            return None, *grads(given, needed, (x, weight, bias, h0), masks, *options), *nothing
        needs_weight = needs_weight or needs_bias
        rest = (x, weight, bias, h0, *masks, h, states, *options, needs_x, needs_weight)
        try:
            grad_x, grad_weight, grad_bias, grad_h0 = operator.backward(grad_h, grad_last, *rest)
        except RuntimeError as error:
            raise errors.of_torch(error) from None
        grads = (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_h0 if needs_h0 else None,
        )
        return None, *grads, *nothing


class ChunkedLayer:
    """A joint op and the linear layer before it, in one namespace."""

    def __init__(self, op: Recurrence, namespace: str) -> None:
        self.op, self.joint = op, OPERATORS[namespace, op.name]
        name = op.name.replace("joint", "layer")
        self.name, library = name, backend.LIBRARIES[namespace]
        self.forward = getattr(getattr(torch.ops, namespace), name).default
        self.backward = getattr(getattr(torch.ops, namespace), f"{name}_backward").default
        library.impl(name, self._forward, "CompositeExplicitAutograd")
        library.impl(f"{name}_backward", self._backward, "CompositeExplicitAutograd")
        library.impl(name, self._dispatched, "Autograd")
        torch.library.register_fake(f"{namespace}::{name}", self._fake)
        torch.library.register_fake(f"{namespace}::{name}_backward", self._fake_backward)

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        """h and the last states, of the arguments of the schema."""
        call = self.forward if torch.compiler.is_compiling() else self._autograd
        return call(*args)[:2]

    def _autograd(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        if forward_ad._current_level >= 0:  # in a compiled function; a layer itself asks before
            h, last = self.whole(*args)
            return h, last, last.new_empty(0)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            function: Any = ChunkedFunction
            return function.apply(self, *args)
        return backend.below_autograd(self.forward, args)

    def _dispatched(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """By the dispatcher: compiled or called directly."""
        transforms.refuse_lost_tangents(self.name, args)
        return self._autograd(*args)

    def _project(self, given: _Arguments, part: slice) -> tuple[Tensor, Tensor]:
        """A part of time, and its projection.

        It is contiguous: of another one, F.linear adds the bias to a product that is rounded.
        """
        x = given.x[:, part].contiguous()
        projection = F.linear(x, given.weight, given.bias)
        if given.real is not None:
            projection = idle(self.op, projection, given.real[:, part])
        return x, projection

    def _forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = _Arguments(*args)
        x, h0, cu_seqlens = given.x, given.h0, given.cu_seqlens
        if cu_seqlens is not None:
            borders(self.name, cu_seqlens, x.shape[1])  # the parts of wrong ones may look right
        chunks = _Chunks(given)
        h, last, states = self._results(given)
        last = last.zero_() if h0 is None else last.copy_(h0)
        with _own_dtype(x):
            for i, part in enumerate(chunks.parts):
                projection = self._project(given, part)[1]
                rows = chunks.rows(part)
                options = (chunks.cut(last[rows], part), *chunks.options(part))
                h[:, part], state = self.joint.forward(projection, *options)
                # What of a chunk lives on lies in memory that was there before: between a chunk's
                # large tensors it would keep the allocator from giving the next one their place.
                del projection
                last[rows] = state
                if i < len(states):
                    crossing = chunks.crossing(part, chunks.behind(part))
                    if crossing is None:
                        states[i] = state
                    else:  # one sequence at most, and 0 times what another one holds may be NaN
                        torch.sum(torch.where(crossing, state, 0.0), 0, True, out=states[i])
        return h, last, states

    def _backward(
        self, grad_h: Tensor | None, grad_last: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (h, states), (needs_x, needs_weight) = args[7:9], args[12:]
        given = _Arguments(*args[:7], *args[9:12])
        x, weight, h0, real = given.x, given.weight, given.h0, given.real
        chunks = _Chunks(given)
        grad_x = x.new_empty(x.shape if needs_x else 0)
        # Sums over chunks are wider than 16 bit, as those within a matrix product are.
        wide = accumulation_dtype(x.dtype)
        grad_weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=wide)
        grad_bias = weight.new_zeros(weight.shape[0] if needs_weight else 0, dtype=wide)
        grad_state = x.new_zeros(sequences_of(x, given.cu_seqlens), h.shape[2], dtype=wide)
        if grad_last is not None:
            grad_state.copy_(grad_last)
        with _own_dtype(x):
            for i in reversed(range(len(chunks.parts))):
                part = chunks.parts[i]
                rows = chunks.rows(part)
                state = None if h0 is None else h0[rows]
                if i:
                    border = chunks.behind(chunks.parts[i - 1])
                    crossing, begin = chunks.crossing(part, border), state
                    state = states[i - 1]
                    if crossing is not None:
                        state = torch.where(crossing, state, 0.0 if begin is None else begin)
                    state = chunks.cut(state, part)
                x_part, projection = self._project(given, part)
                here = None if grad_h is None else grad_h[:, part]
                options = (state, *chunks.options(part))
                grads = (here, grad_state[rows])
                grad, entering = self.joint.backward(*grads, projection, h[:, part], *options)
                del projection  # before the next one is made
                grad_state[rows] = chunks.cut(entering, part)
                if real is not None:
                    grad = torch.where(real[:, part], grad, 0.0)
                if needs_x:
                    grad_x[:, part] = grad @ weight
                if needs_weight:
                    _add_product(grad_weight, grad.flatten(0, 1).t(), x_part.flatten(0, 1))
                    grad_bias += grad.sum((0, 1), dtype=wide)
                del grad
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_state

    def whole(self, *args: Any) -> tuple[Tensor, Tensor]:
        """The same without chunks, of operations that can be differentiated again."""
        given = _Arguments(*args)
        masks = (given.cu_seqlens, given.resets, given.reverse, given.identity)
        with _own_dtype(given.x):
            projection = self._project(given, slice(None))[1]
            return self.joint(projection, given.h0, *masks)

    def whole_backward(
        self,
        given: tuple[Tensor | None, Tensor | None],
        needed: tuple[bool, ...],
        tensors: Any,  # x, weight, bias, h0
        masks: Any,  # cu_seqlens, resets, real
        *options: Any,
    ) -> list[Tensor | None]:
        """The gradients of the tensors where they are needed, by a whole layer's own."""
        with torch.enable_grad():
            # Views: where one depends on another, or has hooks, its gradient is its own alone.
            tensors = [None if x is None else x.view_as(x) for x in tensors]
            results = self.whole(*tensors, *masks, *options)
        used = [(x, grad) for x, grad in zip(results, given, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [x for x, _ in used],
                [x for x, need in zip(tensors, needed, strict=True) if need],
                [grad for _, grad in used],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return [next(found) if need else None for need in needed]

    def _results(self, given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
        """h, the last states and those on the borders of chunks, not filled."""
        x, chunk, packed = given.x, given.chunk, given.cu_seqlens is not None
        channels = given.weight.shape[0] // self.op.parts
        wide: dict[str, Any] = {"dtype": accumulation_dtype(x.dtype)}
        last = x.new_empty(sequences_of(x, given.cu_seqlens), channels, **wide)
        kept = torch.sym_max((x.shape[1] + chunk - 1) // chunk - 1, 0)
        rows = 1 if packed else x.shape[0]
        h = x.new_empty(*x.shape[:2], channels)
        return h, last, x.new_empty(kept, rows, channels, **wide)

    def _fake(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._results(_Arguments(*args))

    def _fake_backward(self, grad_h: Tensor | None, grad_last: Tensor | None, *args: Any) -> Any:
        x, weight, _, _, cu_seqlens, _, _, h = args[:8]
        needs_x, needs_weight = args[-2:]
        states = sequences_of(x, cu_seqlens), h.shape[2]
        return (
            x.new_empty(x.shape if needs_x else 0),
            weight.new_empty(weight.shape if needs_weight else 0),
            weight.new_empty(weight.shape[0] if needs_weight else 0),
            h.new_empty(states, dtype=accumulation_dtype(h.dtype)),
        )


LAYERS = {
    (namespace, op.name): ChunkedLayer(op, namespace)
    for namespace in backend.LIBRARIES
    for op in (MIN_GRU_JOINT, MIN_LSTM_JOINT)
}
