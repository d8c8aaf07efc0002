"""What torch.func is doing to the call that is running."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def nested_forward_mode() -> bool:
    """Whether forward mode runs within forward mode: torch.func.jvp of jvp, jacfwd of jacfwd.

    An autograd.Function loses the inner tangents of its own ``jvp`` there and returns 0 for them,
    so what is differentiated must be made of PyTorch's own operations.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in stack) > 1


def batched_outside_of_autograd(*tensors: Tensor | None) -> bool:
    """Whether one is batched as torch.autograd batches gradients, which is not as torch.func does:
    by functional.jacobian(vectorize=True) or grad(is_grads_batched=True).

    An autograd.Function records its node for the batch and not for what is in it, so that a second
    derivative would leave it out.
    """
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    return any(x is not None and batched(x) for x in tensors)


def any_tangent(args: Iterable[object]) -> bool:
    """Whether one of them is a dual number of forward mode.

    Compiled forward mode does not tell forward_ad of its level, which is always 0.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        # To look is an operation. In a traced graph it would be an alias that nobody uses; Inductor
        # traces twice and expects the same graph.
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        with disable_proxy_modes_tracing():
            return _has_tangent(args)
    return _has_tangent(args)


def _has_tangent(args: Iterable[object]) -> bool:
    return any(
        torch._VF._unpack_dual(x, level=0).tangent is not None
        for x in args
        if isinstance(x, Tensor) and x.is_floating_point()
    )


def refuse_lost_tangents(caller: str, args: Iterable[object]) -> None:
    """Raises where a compiled function has entered a dual level itself.

    An autograd.Function, which asks forward_ad, then drops the tangents.
    """
    if forward_ad._current_level < 0 and any_tangent(args):
        raise RuntimeError(
            f"{caller}: expected forward mode in a compiled function by torch.func.jvp, got a "
            "dual level (torch.autograd.forward_ad), whose tangents torch.compile loses"
        )
