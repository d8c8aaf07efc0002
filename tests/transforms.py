"""All that differentiates a function in PyTorch or runs it over a batch, and all pairs of it.

A transform makes of a function of one tensor another one, so any two can be composed. `check`
compares what a composition makes of a function with what it makes of the same function in plain
PyTorch. Derivatives are weighted sums where PyTorch asks for a direction, so that no sign or order
cancels.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[Tensor], Tensor]
# Of the 2-norm. float32 stays under it where terms cancel too, a missing term or factor does not.
TOLERANCE = 0.02


def _direction(x: Tensor) -> Tensor:
    """Of the shape of x, with numbers that all differ."""
    return torch.arange(1.0, x.numel() + 1, dtype=x.dtype).cos().reshape(x.shape) + 0.5


def _total(f: Function) -> Function:
    """A number; its derivatives in the values of f differ, and so do its second ones."""
    return lambda x: ((y := f(x)) * _direction(y)).sum() + y.square().sum()


def _jvp(f: Function) -> Function:
    return lambda x: torch.func.jvp(f, (x,), (_direction(x),))[1]


def _vjp(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        y, pull = torch.func.vjp(f, x)
        return pull(_direction(y))[0]

    return run


def _vmap(f: Function) -> Function:
    return lambda x: torch.func.vmap(f)(torch.stack([x, x.sin(), -x / 2]))


def _vmap_last(f: Function) -> Function:
    """With the batch in the last dimension of input and output."""
    return lambda x: torch.func.vmap(f, -1, -1)(torch.stack([x, x.sin()], -1))


def _functional_jacobian(**options: object) -> Callable[[Function], Function]:
    return lambda f: lambda x: functional.jacobian(f, x, **options)


def _along(name: str) -> Callable[[Function], Function]:
    """functional.jvp, vjp, hvp and vhp: the last two of a number."""
    run = getattr(functional, name)

    def transform(f: Function) -> Function:
        f = _total(f) if name in ("hvp", "vhp") else f

        def at(x: Tensor) -> Tensor:
            v = _direction(f(x) if name == "vjp" else x)
            return run(f, x, v, create_graph=True)[1]

        return at

    return transform


def _dual(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, _direction(x)))
            tangent = forward_ad.unpack_dual(y).tangent
            return torch.zeros_like(y) if tangent is None else tangent

    return run


def _leaf(x: Tensor) -> Tensor:
    return x * 1 if x.requires_grad else x.clone().requires_grad_()


def _create_graph(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = _leaf(x)
            return torch.autograd.grad(_total(f)(x), x, create_graph=True)[0]

    return run


def _backward(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = _leaf(x)
            torch.autograd.backward(_total(f)(x), inputs=[x], create_graph=True)
            return x.grad

    return run


def _compile(f: Function) -> Function:
    def run(x: Tensor) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(f, backend="aot_eager")(x)

    return run


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "jvp": _jvp,
    "vjp": _vjp,
    "grad": lambda f: torch.func.grad(_total(f)),
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": lambda f: torch.func.hessian(_total(f)),
    "vmap": _vmap,
    "vmap-last": _vmap_last,
    "functional.jacobian": _functional_jacobian(create_graph=True),
    "functional.jacobian-vectorize": _functional_jacobian(create_graph=True, vectorize=True),
    "functional.jacobian-forward": _functional_jacobian(vectorize=True, strategy="forward-mode"),
    "functional.hessian": lambda f: lambda x: functional.hessian(_total(f), x, create_graph=True),
    "functional.hessian-vectorize": lambda f: (
        lambda x: functional.hessian(_total(f), x, create_graph=True, vectorize=True)
    ),
    "functional.hvp": _along("hvp"),
    "functional.vhp": _along("vhp"),
    "functional.jvp": _along("jvp"),
    "functional.vjp": _along("vjp"),
    "dual": _dual,
    "create_graph": _create_graph,
    "backward": _backward,
}
_CORE = ("jvp", "grad", "vmap", "functional.hvp", "create_graph")
_COMPILED = ("jvp", "vjp", "grad", "jacfwd", "jacrev", "hessian", "vmap", "dual", "create_graph")
# Some other pairs torch 2.13 cannot compile, whatever the function, and then it compiles none.
_COMPILED_PAIRS = ("jvp", "grad", "jacrev", "vmap")


def clean_up() -> None:
    """What an exception within torch.compile leaves behind, as of torch 2.13."""
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
    if torch._C._is_fwd_grad_enabled():
        with contextlib.suppress(RuntimeError):
            torch._C._exit_dual_level(level=0)
    forward_ad._current_level = -1


# PyTorch composes these with each other. Where it mixes them with others, it may refuse.
_TORCH_FUNC = {"jvp", "vjp", "grad", "jacfwd", "jacrev", "hessian", "vmap", "vmap-last"}
_REVERSE = {*TRANSFORMS} - _TORCH_FUNC - {"dual", "functional.jacobian-forward"}


@dataclass(frozen=True)
class Composition:
    """Transforms from the outermost to the innermost."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return " of ".join(self.names)

    def __call__(self, f: Function) -> Function:
        for name in reversed(self.names):
            f = _compile(f) if name == "compile" else TRANSFORMS[name](f)
        return f

    def check(self, ours: Function, plain: Function, x: Tensor) -> None:
        """Ours is right. What PyTorch refuses to do to the plain function is skipped."""
        torch.testing.assert_close(ours(x), plain(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = self(plain)(x)
                size = float(expected.norm())
            except Exception as refused:
                clean_up()
                self._skip(f"PyTorch itself refuses: {refused}")
            if size == 0:
                self._skip("PyTorch itself gives 0")
            got = self(ours)(x)
        assert got.shape == expected.shape
        assert size > 0.01, "this input tells nothing"
        tolerance = TOLERANCE if x.dtype == torch.float32 else 1e-6
        assert (got - expected).norm() < tolerance * max(size, 0.1)

    def _skip(self, reason: str) -> NoReturn:
        names = {*self.names}
        # torch 2.13 compiles a pair in one process and refuses it in another.
        assert "compile" not in self.names or len(self.names) == 3, reason
        assert len(self.names) > 1 and not names <= _TORCH_FUNC and not names <= _REVERSE, reason
        pytest.skip(reason[:200])


_SINGLES = [Composition((name,)) for name in TRANSFORMS]
QUICK = [*_SINGLES, *(Composition((a, b)) for a in _CORE for b in _CORE)]
ALL = [*_SINGLES, *(Composition((a, b)) for a in TRANSFORMS for b in TRANSFORMS)]
COMPILED = [
    *(Composition(("compile", name)) for name in _COMPILED),
    *(Composition((name, "compile")) for name in _COMPILED),
    *(Composition(("compile", a, b)) for a in _COMPILED_PAIRS for b in _COMPILED_PAIRS),
]


def compositions(chosen: list[Composition]) -> pytest.MarkDecorator:
    """Runs a test, which takes a `composition`, for each of them."""
    return pytest.mark.parametrize("composition", chosen, ids=str)


class Seen(TorchDispatchMode):
    """The operators that a mode of PyTorch gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))
