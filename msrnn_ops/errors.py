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


def check_rows(
    caller: str,
    rows: object,
    batch: int | None,
    count: int,
    where: torch.device,
    owner: str,
    *,
    once: bool = True,
) -> bool:
    """Raises unless rows of a batch may name those of a state that has ``count``.

    Where the numbers are known without waiting for a device, each is one of these rows, named
    ``once``, or -1. Returns whether they are.
    """
    if not isinstance(rows, Tensor):
        raise kind(caller, "rows", "a tensor", rows)
    if rows.dtype not in (torch.int32, torch.int64):
        raise dtype(caller, "rows", "int32 or int64", rows.dtype)
    if rows.dim() != 1 or (batch is not None and rows.shape[0] != batch):
        raise shape(caller, "rows", "(B,)" if batch is None else (batch,), rows)
    if rows.device != where:
        raise device(caller, "rows", owner, where, rows.device)
    if torch.compiler.is_compiling() or type(rows) is not Tensor or not rows.is_cpu:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(rows):
        return False
    named: set[int] = set()
    for row in rows.tolist():
        if not -1 <= row < count:
            raise value(caller, f"rows in [0, {count}), or -1 for none", row)
        if once and row in named:
            raise value(caller, "rows that each name another row of the state", f"{row} twice")
        if row >= 0:
            named.add(row)
    return True


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
