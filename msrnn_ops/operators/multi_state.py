"""The multi-state operators as PyTorch sees them: fake tensors, autograd, what PyTorch computes.

Those that change a state have no gradient; ``attend_sequence``, which has no state, has one. A GPU
has kernels for a step and for a sequence; a prompt and the backward pass of a sequence are made of
PyTorch's operators there (prompt.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msrnn_ops import backend
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators import prompt
from msrnn_ops.operators.in_place import InPlace, is_plain
from msrnn_ops.transforms import any_tangent


class AttendSequence(torch.autograd.Function):
    """attend_sequence, differentiable for the choices that it made."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return backend.below_autograd(args[0].kernel, args[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        operator, q, k, v, valid, *_, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, output[1], valid)
        ctx.operator, ctx.scale = operator, scale

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> Any:
        q, k, v, expiry, valid = ctx.saved_tensors
        grads = ctx.operator.differentiate(grad_out, q, k, v, expiry, valid, ctx.scale)
        return None, *grads, *(None,) * 7


class SequenceOperator:
    """attend_sequence in one namespace, and its backward pass.

    The kernels compute values and first derivatives. All others come from PyTorch's operations
    (prompt.py), which every transform of PyTorch knows, for the choices that a kernel made: in
    forward mode, in torch.func, and where a backward pass is recorded to be differentiated.
    """

    _function: Any = AttendSequence  # whose `apply` has no types

    def __init__(self, namespace: str) -> None:
        operators, library = getattr(torch.ops, namespace), backend.LIBRARIES[namespace]
        self.kernel = operators.attend_sequence.default
        self.backward = operators.attend_sequence_backward.default
        library.impl("attend_sequence", self._autograd, "Autograd")
        library.impl("attend_sequence_backward", self._autograd_backward, "Autograd")
        for kernel in (self.kernel, self.backward):
            torch.library.register_vmap(kernel, _over_batch(kernel), lib=library)

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self._run(*args) if is_plain() else self.kernel(*args)

    def _run(self, *args: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._function.apply(self, *args)
        return AttendSequence.forward(self, *args)

    def _autograd(self, *args: Any) -> tuple[Tensor, Tensor]:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        transformed = recorded and torch._C._are_functorch_transforms_active()
        if not transformed and not any_tangent(args):
            return self._run(*args)
        _, expiry = AttendSequence.forward(self, *_detached(args))
        q, k, v, valid, *_, scale = args
        return _by_operations(prompt.attend_sequence, q, k, v, expiry, valid, scale), expiry

    def differentiate(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The backward pass; the arguments are those of its schema."""
        if is_plain() and not torch.is_grad_enabled():
            return backend.below_autograd(self.backward, args)
        return self.backward(*args)

    def _autograd_backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not recorded and not any_tangent(args):
            return backend.below_autograd(self.backward, args)
        return _by_operations(prompt.attend_sequence_backward, *args)


def _by_operations(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    if is_distributed(x):
        raise NotImplementedError(
            "attend_sequence: no second derivatives, no forward mode and no torch.func of DTensors"
        )
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *args)


def _detached(args: tuple[Any, ...]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in args]


def _over_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.vmap makes of an operator whose tensors all start with a batch."""

    def run(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1).contiguous()

        outputs = kernel(*map(fold, args, in_dims))
        return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0,) * len(outputs)

    return run


def _fake_sequence(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, slots: int, per_head: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    groups = k.shape[1] if per_head else 1
    return q.new_empty(q.shape), q.new_empty((q.shape[0], groups, q.shape[2]), dtype=torch.int64)


FAKES: dict[str, Callable[..., Any]] = {
    "attend_evict": lambda q, *_: q.new_empty(q.shape if q.dim() == 3 else q.transpose(1, 2).shape),
    "attend_scores": lambda q, k, v, rows, keys, values, position, *_: (
        q.new_empty(q.shape),
        position.new_empty((q.shape[0], *position.shape[1:]), dtype=torch.float32),
    ),
    "evict": lambda *_: None,
    "attend_prompt": lambda q, *_: q.new_empty(q.shape),
    "store_prompt": lambda *_: None,
    "attend_sequence": _fake_sequence,
    "attend_sequence_backward": lambda grad, q, k, v, *_: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    ),
}


def as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel is by itself: without autocast, and at home with inference tensors."""

    def run(q: Tensor, *args: Any) -> Any:
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with no_autocast, torch._C._AutoDispatchBelowADInplaceOrView():
            return function(q, *args)

    return run


def prompt_function(
    on_cpu: bool, total: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., Tensor]:
    """attend_prompt by PyTorch's operators; ``total`` as in :func:`prompt.store_prompt`."""
    store: Callable[..., None] = partial(prompt.store_prompt, total=total)
    if on_cpu and total is None:
        store = torch.ops.msrnn_ops.store_prompt.default
    output = prompt.output_by_rows if on_cpu else prompt.output_by_parts
    return partial(prompt.attend_prompt, output, store)


# The operators that PyTorch computes on a GPU.
ON_DEVICE: dict[str, Callable[..., Any]] = {
    "attend_prompt": as_kernel(prompt_function(on_cpu=False)),
    "store_prompt": as_kernel(prompt.store_prompt),
    "attend_sequence_backward": as_kernel(prompt.attend_sequence_backward),
}
backend.LIBRARIES[backend.COMPILED].impl(
    "attend_prompt", as_kernel(prompt_function(on_cpu=True)), "CPU"
)
backend.implement_by_triton(
    "multi_state", ["attend_evict", "attend_scores", "evict", "attend_sequence"]
)
for _namespace, _library in backend.LIBRARIES.items():
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
    for _name, _kernel in ON_DEVICE.items():
        _library.impl(
            _name,
            _kernel,
            "CUDA" if _namespace == backend.COMPILED else "CompositeExplicitAutograd",
        )
IN_PLACE = {
    (namespace, name): InPlace(namespace, name, "msrnn_ops.attend_sequence")
    for namespace in backend.LIBRARIES
    for name in ("attend_evict", "attend_scores", "evict", "attend_prompt", "store_prompt")
}
SEQUENCES = {namespace: SequenceOperator(namespace) for namespace in backend.LIBRARIES}
