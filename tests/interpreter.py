"""Repairs of Triton's interpreter, which runs the kernels on the CPU (versions 3.6 to 3.9).

As it comes, it truncates float32 to bfloat16 where a GPU rounds, multiplies bfloat16 matrices as
if their bits were integers, rounds a fused multiply-add twice, composes a generic associative scan
by a Python call an element, and prepares the language anew for every call of a device function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from msrnn_ops.triton_kernels import scan, tuning


def _bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _float32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _scan(self: Any, inputs: Any) -> Any:
    """log2(n) calls on whole blocks: every element with the one 1, 2, 4 ... before it."""
    axis, types = self.axis, [x.dtype for x in inputs]
    found = [np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    distance = 1
    while distance < found[0].shape[0]:
        earlier = [np.concatenate([x[:distance], x[:-distance]]) for x in found]
        pairs = zip([*earlier, *found], [*types, *types], strict=True)
        both = self.combine_fn.fn(*(self.to_tensor(x, t) for x, t in pairs))
        both = both if isinstance(both, tuple) else (both,)
        later = [x.handle.data[distance:] for x in both]
        found = [np.concatenate([x[:distance], y]) for x, y in zip(found, later, strict=True)]
        distance *= 2
    whole = [np.ascontiguousarray(np.moveaxis(x, 0, axis)) for x in found]
    return [self.to_tensor(x, t) for x, t in zip(whole, types, strict=True)]


_prepared: set[str] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.fn.__module__ not in _prepared:  # what a kernel's launch prepares is its own module's
        _prepared.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)  # int() of an array of one element: not with every NumPy
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


# Many segments and wide blocks, since what takes time is the number of operations, not their size.
_TILES = {"walk": (1, 4, 256, 1), "segments": (64, 2, 128, 4), "chunks": (16, 2, 128, 4)}


def shrink_gpu() -> None:
    """Small calls take every form."""
    scan._FILL, scan._NEARLY, scan._FEWEST_STEPS, scan._FEWEST_CHUNKS = 300, 150, 16, 3


def repair() -> None:
    tuning.SCANS.update({key: _TILES[key[1]] for key in tuning.SCANS})
    shrink_gpu()
    builder = interpreter.InterpreterBuilder
    cast, dot, fma = builder.cast_impl, builder.create_dot, builder.create_fma

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        if source.dtype.scalar == tl.float32 and wanted.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, wanted)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(_float32(x.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if a.dtype.scalar != tl.float32:
            return fma(self, a, b, c)
        exact = a.data.astype(np.float64) * b.data + c.data
        return interpreter.TensorHandle(exact.astype(np.float32), a.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fma = create_fma
    interpreter.ScanOps.generic_scan = _scan
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_lang_tensor = _patch_lang_tensor
