"""The sentences of this package's errors: who was called, what was expected, and what came.

Each function makes an exception, and its caller raises it: a check that holds costs no call.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def kind(caller: str, argument: str, expected: str, got: object) -> TypeError:
    """An argument of the wrong Python type; ``expected`` comes with its article."""
    return TypeError(f"{caller}: expected {argument} to be {expected}, got {type(got).__name__}")


def shape(
    caller: str, argument: str, expected: object, got: Tensor, remedy: str = ""
) -> ValueError:
    return ValueError(
        f"{caller}: expected {argument} of shape {expected}, got {tuple(got.shape)}{remedy}"
    )


def dtype(caller: str, argument: str, expected: object, got: torch.dtype) -> TypeError:
    return TypeError(f"{caller}: expected {argument} in {expected}, got {got}")


def layout(caller: str, argument: str, got: Tensor) -> TypeError:
    return TypeError(f"{caller}: expected {argument} to be a strided tensor, got {got.layout}")


def device(
    caller: str, argument: str, owner: str, expected: torch.device, got: torch.device
) -> ValueError:
    """``owner`` is whose device the argument should be on."""
    return ValueError(
        f"{caller}: expected {argument} on the device of {owner}, {expected}, got {got}"
    )


def value(caller: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{caller}: expected {expected}, got {got}")


def check_int(caller: str, argument: str, number: object, least: int | None = None) -> None:
    """Raises unless it is an int, and at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt):
        raise TypeError(f"{caller}: expected {argument} to be an int, got {number!r}")
    if least is not None and number < least:
        raise value(caller, f"{argument} >= {least}", number)


def check_number(
    caller: str, argument: str, number: object, least: float = -math.inf, most: float = math.inf
) -> None:
    """Raises unless it is a finite number from ``least`` to ``most``."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{caller}: expected {argument} to be a number, got {number!r}")
    if not math.isfinite(number):
        raise value(caller, f"{argument} to be finite", number)
    if not least <= float(number) <= most:
        bounds = f">= {least}" if most == math.inf else f"in [{least}, {most}]"
        raise value(caller, f"{argument} {bounds}", number)


def of_torch(error: RuntimeError) -> Exception:
    """What a kernel raised, in the type that PyTorch's own operators have for it.

    Only text crosses LibTorch's stable ABI, but trainers catch torch.OutOfMemoryError.
    """
    if isinstance(error, NotImplementedError) and "Sparse" in str(error):
        return TypeError(
            f"expected strided tensors, got sparse ones: {str(error).split(chr(10))[0]}"
        )
    if type(error) is RuntimeError and " out of memory. Tried to allocate" in str(error):
        return torch.OutOfMemoryError(str(error))
    return error
