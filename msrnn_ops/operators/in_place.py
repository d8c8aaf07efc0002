"""Operators that change a state where it is: they have no gradient, and say so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msrnn_ops import backend
from msrnn_ops.transforms import any_tangent


def is_plain() -> bool:
    """Whether tensors are just that, so that an operator needs no way through the dispatcher."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def is_as_it_lies(x: Tensor) -> bool:
    """Whether memory has the elements of a tensor: not those of a subclass, nor of a view that
    PyTorch's dispatcher negates before a kernel sees it. Kernels refuse other layouts and devices.
    """
    return type(x) is Tensor and not x.is_neg()


def refuse_gradient(name: str, instead: str, tensors: Iterable[Tensor]) -> None:
    """Of an operator that changes a state, whose past values are gone."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} changes the state in place and has no gradient: call it under torch.no_grad() "
            f"or detach its inputs; {instead} is the differentiable form"
        )
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, instead, tensors)


def _refuse_tangents(name: str, instead: str, args: Iterable[Any]) -> None:
    if any_tangent(args):
        raise RuntimeError(
            f"{name} changes the state in place and has no forward-mode gradient; "
            f"{instead} is the differentiable form"
        )


class InPlace:
    """An operator that changes a state, in one namespace: its kernel and its autograd.

    ``instead`` names the function that has a gradient.
    """

    def __init__(self, namespace: str, name: str, instead: str) -> None:
        self.name, self._instead = name, instead
        self.kernel = getattr(getattr(torch.ops, namespace), name).default
        arguments = self.kernel._schema.arguments
        written = [i for i, x in enumerate(arguments) if x.alias_info is not None]
        self._written = slice(written[0], written[-1] + 1) if written else slice(0)
        library = backend.LIBRARIES[namespace]
        library.impl(name, self._autograd, "Autograd")
        torch.library.register_vmap(self.kernel, self._refuse_vmap, lib=library)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args) if is_plain() else self.kernel(*args)

    def _autograd(self, *args: Any) -> Any:
        _refuse_tangents(self.name, self._instead, args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        refuse_gradient(self.name, self._instead, [x for x in args if isinstance(x, Tensor)])
        out = backend.below_autograd(self.kernel, args)
        # So that a backward pass that has saved what is written says so.
        torch._C._increment_version(args[self._written])
        return out

    def run_plain(self, args: tuple[Any, ...], on_cpu: bool) -> Any:
        """A call of plain tensors on a CPU or GPU, where nothing asks for a gradient."""
        out = backend.of_device(self.kernel, args, on_cpu)
        torch._C._increment_version(args[self._written])
        return out

    def _refuse_vmap(self, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"{self.name} changes the state in place, which torch.vmap cannot: call it without "
            f"torch.vmap, with a state whose batch is all rows; {self._instead} works under "
            "torch.vmap"
        )
