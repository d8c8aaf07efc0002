#!/usr/bin/env bash
# PyTorch: a gradient that is batched and recorded leaves an autograd.Function out of the second
# derivative, without a word.
#
# `torch.autograd.grad(..., is_grads_batched=True, create_graph=True)` and
# `torch.autograd.functional.jacobian(..., vectorize=True, create_graph=True)` run the backward pass
# over a batch of gradients. A backward pass that calls an autograd.Function itself, as one does that
# is written to be differentiated twice, gives the right first derivative. Differentiated once more,
# what went through that call is missing: the node is recorded for the batch, and not for the tensor
# within it. Gradients taken one by one are right, and so is torch.func.jacrev.
#
# y = x^3, whose backward pass multiplies by an autograd.Function of x and the gradient. The second
# derivative of sum(y) at x = 2 is 6 x = 12.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   one by one: first 12.0 second 12.0
#   batched: first 12.0 second None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/case.py" <<'PYTHON'
import torch


class Product(torch.autograd.Function):
    """grad * 3 x^2, differentiable."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(x, grad)
        return grad * 3 * x * x

    @staticmethod
    def backward(ctx, outer):
        x, grad = ctx.saved_tensors
        return outer * grad * 6 * x, outer * 3 * x * x


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return Product.apply(*ctx.saved_tensors, grad)


def derivatives(batched):
    x = torch.tensor([2.0], requires_grad=True)
    one = torch.ones(1, 1) if batched else torch.ones(1)
    y = Cube.apply(x)
    (first,) = torch.autograd.grad(y, x, one, is_grads_batched=batched, create_graph=True)
    if not first.requires_grad:
        return first.item(), None
    (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    return first.item(), None if second is None else second.item()


for name, batched in (("one by one", False), ("batched", True)):
    first, second = derivatives(batched)
    print(f"{name}: first {first} second {second}")
PYTHON
found=$("$folder/venv/bin/python" -W ignore "$folder/case.py")
echo "$found"
[ "$found" = "one by one: first 12.0 second 12.0
batched: first 12.0 second None" ]
