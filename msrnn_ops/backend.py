"""Which implementation computes an op, and why another one does not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
if not any(_FOLDER.glob("_C*.so")) or not any(_FOLDER.glob("_cpu*.so")):
    raise ImportError(
        "msrnn_ops has not been built here: run `pip install -e . --no-build-isolation` in the "
        "source tree, or start Python outside of it to use an installed package"
    )

from msrnn_ops import _C, errors  # noqa: E402


def _check_capability() -> None:
    """The kernels read this variable, and would take any other name for the first of these."""
    wanted = os.environ.get("MSRNN_CPU_CAPABILITY")
    known: Any = _C.build_info()["cpu"]
    if wanted and wanted not in known:
        names = ", ".join(known)
        raise ValueError(f"expected MSRNN_CPU_CAPABILITY to be one of {names}, got {wanted!r}")


_check_capability()
_NAMES = ("cuda", "triton", "cpu", "reference")
_TRITON_INSTALLED = find_spec("triton") is not None

# Namespaces of operators: compiled kernels, by device; and Triton's, for any device.
COMPILED = "msrnn_ops"
TRITON = "msrnn_triton"

# What `use_backend` chose: None lets the device decide.
_chosen: str | None = None


def backends() -> dict[str, str]:
    """State of every backend: ``"ok"``, or the reason why it cannot be used here.

    >>> import msrnn_ops as ms
    >>> ms.backends()["cpu"]
    'ok'
    """
    return {
        "cuda": _cuda(),
        "triton": _triton(),
        "cpu": "ok",
        "reference": "ok",
    }


def build_info() -> dict[str, object]:
    """How this build was made: version, compiler, targeted torch ABI, CUDA, instruction sets.

    >>> import msrnn_ops as ms
    >>> ms.build_info()["torch_target"]
    '2.11'
    """
    return dict(_C.build_info())


def _load_cuda() -> str | None:
    """Loads the CUDA operators where they were built; says why where that fails.

    The CPU operators must work all the same, as in an environment whose torch has lost its CUDA.
    """
    for path in _FOLDER.glob("_cuda*.so"):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = str(error.__cause__ or error).removeprefix(f"{path}: ")
            return f"its library cannot be loaded with torch {torch.__version__} ({reason})"
    return None


def _load_libraries() -> dict[str, torch.library.Library]:
    """The operators to register for, by namespace; with Triton each operator is defined twice."""
    libraries = {COMPILED: torch.library.Library(COMPILED, "IMPL")}
    if _TRITON_INSTALLED:
        libraries[TRITON] = torch.library.Library(TRITON, "DEF")
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith(f"{COMPILED}::"):
                schema = getattr(torch.ops.msrnn_ops, name.split("::")[1]).default._schema
                libraries[TRITON].define(str(schema).removeprefix(f"{COMPILED}::"))
    return libraries


# Loading asks no device for anything: a process that forks after the import can still use CUDA.
for _path in _FOLDER.glob("_cpu*.so"):
    torch.ops.load_library(_path)
_cuda_failure = _load_cuda()
_CUDA_LOADED = _cuda_failure is None and any(_FOLDER.glob("_cuda*.so"))
LIBRARIES: dict[str, torch.library.Library] = _load_libraries()


def implement_by_triton(module: str, names: Iterable[str]) -> None:
    """Registers msrnn_ops.triton_kernels.<module>; for CUDA too where nothing compiled is loaded.

    Triton is imported by the first call.
    """
    if TRITON not in LIBRARIES:
        return
    for name in names:
        run = _imported_at_first(module, name)
        LIBRARIES[TRITON].impl(name, run, "CompositeExplicitAutograd")
        if not _CUDA_LOADED:
            LIBRARIES[COMPILED].impl(name, run, "CUDA")


def _imported_at_first(module: str, name: str) -> Callable[..., Any]:
    @cache
    def function() -> Callable[..., Any]:
        return import_module(f"msrnn_ops.triton_kernels.{module}").OPERATORS[name]

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():  # at home with inference tensors
            return function()(*args)

    return run


@cache
def _cuda() -> str:
    if _cuda_failure is not None:
        return _cuda_failure
    if _C.build_info()["cuda"] is None:
        return "not built: install where torch has CUDA and nvcc is found, or with FORCE_CUDA=1"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return "ok"


@cache
def _triton() -> str:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if _interpreted():
        return "ok"
    if not torch.cuda.is_available():
        xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
        return "ok" if xpu else "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"Triton needs compute capability 8.0, this GPU has {major}.{minor}"
    return "ok"


def _usable(name: str) -> bool:
    return (_cuda() if name == "cuda" else _triton()) == "ok"


# torch.compile takes the answer and does not look at how it is found. This is what
# torch.compiler.assume_constant_result sets, after two seconds of importing Dynamo.
_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _validated(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"expected a backend among {', '.join(_NAMES)}, got {name!r}")
    state = backends()[name]
    if state != "ok":
        raise ValueError(f"backend {name!r} cannot be used: {state}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute the ops called in this block with one backend, whatever their device.

    The choice is recorded by each call: a backward pass outside of the block uses it too. It holds
    for the whole process. ``MSRNN_BACKEND=name`` in the environment sets it from the start.

    Args:
        name: ``"reference"`` (plain PyTorch, slow, any device), ``"cpu"``, ``"cuda"`` or
            ``"triton"`` (a GPU; with TRITON_INTERPRET=1 also the CPU, slowly).

    Raises:
        ValueError: the name is unknown, or that backend cannot be used here; in the block, an op is
            given tensors on a device that the backend does not serve.

    >>> import torch, msrnn_ops as ms
    >>> gate, candidate = torch.randn(2, 1, 5, 3)
    >>> with ms.use_backend("reference"):
    ...     h = ms.min_gru(gate, candidate)
    >>> torch.allclose(h, ms.min_gru(gate, candidate), atol=1e-6)
    True
    """
    global _chosen
    before, _chosen = _chosen, _validated(name)
    try:
        yield
    finally:
        _chosen = before


def namespace(op: str, device: torch.device) -> str | None:
    """The namespace of the operator that computes a call; None: the reference does.

    Meta and fake tensors need no kernels.
    """
    kind = device.type
    if _chosen is None and kind == "cpu":  # at every call: first and fast
        return COMPILED
    if _chosen == "reference":
        return None
    if kind == "meta":
        return COMPILED
    if _chosen == "triton":
        if kind == "cpu" and not _interpreted():
            raise ValueError(f"{op}: expected tensors on a GPU for Triton, got {device}")
        return TRITON
    if _chosen not in (None, kind):
        raise ValueError(f"{op}: expected tensors on {_chosen}, the chosen backend, got {device}")
    if kind == "cpu" or (kind == "cuda" and _usable("cuda")):
        return COMPILED
    if _usable("triton"):
        return COMPILED if kind == "cuda" else TRITON
    reason = f"{_cuda()}; {_triton()}" if kind == "cuda" else "no such kernels"
    raise ValueError(
        f"{op}: expected tensors on cpu, got {device} ({reason}); "
        "msrnn_ops.use_backend('reference') computes on any device with plain PyTorch"
    )


def is_compiled(op: str, x: torch.Tensor) -> bool:
    """Whether C++ or CUDA computes a call, which Triton may do under the name of either."""
    if _chosen is None and x.is_cpu:  # at every step: first and fast
        return True
    compiled = x.is_cpu or (x.is_cuda and _CUDA_LOADED)
    return compiled and namespace(op, x.device) == COMPILED


if os.environ.get("MSRNN_BACKEND"):
    _chosen = _validated(os.environ["MSRNN_BACKEND"])


def below_autograd(kernel: Any, args: Iterable[Any]) -> Any:
    """What an operator computes, without derivatives; failures in the types that PyTorch has."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)
    except RuntimeError as error:
        raise errors.of_torch(error) from None


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def _watched() -> bool:
    """Whether a mode of PyTorch, a trace or a profiler wants to see every call."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or torch._C._is_tracing()
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def of_device(kernel: Any, args: Iterable[Any], on_cpu: bool) -> Any:
    """As :func:`below_autograd`, for tensors on a CPU or GPU that lie in memory as they are.

    The dispatcher calls the kernel of the device and asks nobody else, in two thirds of the time,
    unless somebody watches.
    """
    if not _watched():
        try:
            return kernel._handle.redispatch_boxed(_CPU if on_cpu else _CUDA, *args)
        except RuntimeError:
            pass  # nothing is written, and the dispatcher may know how to read a tensor
    return below_autograd(kernel, args)
