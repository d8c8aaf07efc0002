"""What torch.func is doing to the call that is running."""

from __future__ import annotations

import torch
from torch import Tensor


def nested_forward_mode() -> bool:
    """Whether forward mode runs within forward mode: torch.func.jvp of jvp, jacfwd of jacfwd.

    An autograd.Function loses the inner tangents of its own ``jvp`` there and returns 0 for them,
    so what is differentiated must be made of PyTorch's own operations.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in stack) > 1


def batched_outside_of_autograd(*tensors: Tensor | None) -> bool:
    """Whether one is batched as torch.autograd batches gradients: functional.jacobian(vectorize=True)
    and grad(is_grads_batched=True).

    An autograd.Function records its node for the batch and not for what is in it, so that a second
    derivative would leave it out.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return any(x is not None and batched(x) for x in tensors)
