"""What torch.func is doing to the call that is running."""

from __future__ import annotations

import torch


def nested_forward_mode() -> bool:
    """Whether forward mode runs within forward mode: torch.func.jvp of jvp, jacfwd of jacfwd.

    An autograd.Function loses the inner tangents of its own ``jvp`` there and returns 0 for them,
    so what is differentiated must be made of PyTorch's own operations.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in stack) > 1
