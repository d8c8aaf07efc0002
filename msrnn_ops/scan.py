"""The scans: the public functions, and what each of them computes.

A call goes through its door in checks.py, then to the reference (reference.py) or to an operator
(operators/scan.py), whose kernels are in csrc/.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from msrnn_ops import backend, checks
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators.complex_scan import COMPLEX_LINEAR
from msrnn_ops.operators.in_place import is_plain
from msrnn_ops.operators.scan import (
    DECAY,
    LINEAR,
    LOG,
    MIN_GRU,
    MIN_GRU_JOINT,
    MIN_LSTM,
    MIN_LSTM_JOINT,
    OPERATORS,
    STEPS,
    Recurrence,
)

WithState: TypeAlias = tuple[Tensor, Tensor]  # h and the last states


class ScanOptions(TypedDict, total=False):
    """What every scan takes beside its inputs; for the overloads."""

    reverse: bool
    cu_seqlens: Tensor | None
    resets: Tensor | None


class GateOptions(ScanOptions, total=False):
    activation: str


def run(
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    return_state: bool = True,
    activation: str | None = None,
    caller: str = "",
    state: str = "",
) -> tuple[Tensor, Tensor]:
    """h and the last states: checks the arguments, chooses the backend, and calls the operator."""
    if cu_seqlens is None and resets is None:
        found = _unchecked(op, inputs, h0, reverse, return_state, activation)
        if found is not None:
            return found
    inputs, h0, resets, flags, leading = checks.scan(
        op, inputs, h0, cu_seqlens, resets, reverse, return_state, activation, caller, state
    )
    args: tuple[Any, ...] = (*inputs, h0, cu_seqlens, resets, reverse, *flags)
    if is_distributed(inputs[0]):
        args = checks.placed(op.name, args)
    namespace = backend.namespace(op.name, inputs[0].device)
    if namespace is None:
        h, last = op.plain(*args)
    else:
        complex_numbers = op is LINEAR and inputs[0].is_complex()
        name = COMPLEX_LINEAR.name if complex_numbers else op.name
        h, last = OPERATORS[namespace, name](*args)
    return (h, last) if leading is None else in_leading(h, last, leading, cu_seqlens)


def _unchecked(
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    reverse: bool,
    return_state: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor] | None:
    """A call whose operator sees what could be wrong with it, in a third of the time.

    None: it does not, or something is wrong, which the checks have the words for.
    """
    if not is_plain() or torch._C._is_tracing() or torch.is_autocast_enabled("cpu"):
        return None
    for x in inputs if h0 is None else (*inputs, h0):
        if type(x) is not Tensor or not x.is_cpu or x.is_neg():
            return None
    flags: tuple[bool, ...] = (activation == "identity",) if op.flags else ()
    known = not flags or flags[0] or activation == "g"
    if not known or type(reverse) is not bool or type(return_state) is not bool:
        return None
    if not backend.is_compiled(op.name, inputs[0]):
        return None
    operator = OPERATORS[backend.COMPILED, op.name]
    args = (*inputs, h0, None, None, reverse, *flags)
    try:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return operator.eager(*args)
        h, last = backend.of_device(operator.forward, args, on_cpu=True)
        return h, last
    except RuntimeError:
        return None


def in_leading(
    h: Tensor, last: Tensor, leading: torch.Size, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Results in the dimensions that the inputs had before T."""
    h = h.reshape(*leading, *h.shape[1:])
    return h, last if cu_seqlens is not None else last.reshape(*leading, last.shape[1])


# fmt: off
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ScanOptions]) -> Tensor: ...
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ScanOptions]) -> WithState: ...
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ScanOptions]) -> Tensor | WithState: ...
# fmt: on
def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    """First-order linear recurrence over time, elementwise over channels.

    .. math:: h_t = a_t h_{t-1} + b_t

    Args:
        a: decay, (B, T, D), (T, D) or any dimensions before T; any strides; float32, float64,
            bfloat16, float16, complex64 or complex128. Any value; where abs(a) > 1 long products
            may leave the range of floats.
        b: input, in the dtype of ``a`` and a shape that broadcasts with its, so that (B, T, 1) or
            (1, T, D) serves for all channels or rows, without a copy.
        h0: initial state, (B, D), or (N, D) with ``cu_seqlens``; in the dtype of ``a`` or the
            accumulation dtype (float32, but for wider and complex numbers). None: 0. For one state
            for all rows say ``h0.expand(B, -1)``.
        reverse: run from t = T-1 to 0; ``h0`` enters at T-1 and the last state is that at 0.
        cu_seqlens: (N+1,) int32 or int64, within 0 to T, not decreasing; B = 1. Sequence n is
            ``[cu_seqlens[n], cu_seqlens[n+1])``; sequences may be empty. Steps before the first and
            behind the last one are padding: zeros in h and in every gradient.
        resets: (B, T) bool. Where it is set, no state crosses the border before that step, in
            either direction: the step starts from 0 (:func:`log_scan`: log 0), not from ``h0``.
        return_state: also return the last state.

    Returns:
        h, (B, T, D) in the dtype of ``a``; with ``return_state`` also the last state, (B, D) or
        (N, D), in the accumulation dtype, a copy of ``h0`` for an empty sequence.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape, device or cu_seqlens.

    Differentiable in a, b and h0, through h and the last state, to any order and by every transform
    of PyTorch. In float32, inputs and gradients below 1e-38 are read as 0, here and in every scan.

    Source: Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence
    Length", the linear surrogate recurrence.

    >>> import torch, msrnn_ops as ms
    >>> ms.linear_scan(torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    h, last = run(LINEAR, (a, b), h0, cu_seqlens, resets, reverse, return_state)
    return (h, last) if return_state else h


# fmt: off
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ScanOptions]) -> Tensor: ...
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ScanOptions]) -> WithState: ...
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ScanOptions]) -> Tensor | WithState: ...
# fmt: on
def decay_scan(
    log_a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    r"""Linear recurrence with its decay given as a logarithm, its input signed.

    .. math:: h_t = e^{\mathrm{log\_a}_t} h_{t-1} + b_t

    Slow decays keep their precision: 1 - exp(log_a) is formed without cancellation.

    Args:
        log_a: natural logarithm of the decay, (B, T, D), usually <= 0; -inf forgets everything.
        b: input, in the shape and dtype of ``log_a``.
        h0, reverse, cu_seqlens, resets, return_state: as in :func:`linear_scan`.

    Returns:
        As :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`.

    Source: the gate of HGRN, Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for
    Sequence Modeling", its recurrence with the decay in log-space.

    >>> import torch, msrnn_ops as ms
    >>> log_a = torch.full((1, 3, 1), 0.5).log()
    >>> ms.decay_scan(log_a, torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1)).flatten()
    tensor([ 1.0000, -0.5000, -0.2500])
    """
    h, last = run(DECAY, (log_a, b), h0, cu_seqlens, resets, reverse, return_state)
    return (h, last) if return_state else h


# fmt: off
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ScanOptions]) -> Tensor: ...
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ScanOptions]) -> WithState: ...
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ScanOptions]) -> Tensor | WithState: ...
# fmt: on
def log_scan(
    log_a: Tensor,
    log_b: Tensor,
    log_h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    r"""The linear recurrence of positive numbers, entirely in log-space.

    .. math:: \log h_t = \log(e^{\mathrm{log\_a}_t + \log h_{t-1}} + e^{\mathrm{log\_b}_t})

    Exact far beyond the range of exp. Where log 0 meets log 0 the result is log 0 and no gradient
    flows.

    Args:
        log_a: logarithm of the decay, (B, T, D); -inf is a decay of 0.
        log_b: logarithm of the input, in the shape and dtype of ``log_a``; -inf is 0.
        log_h0: logarithm of the initial state, (B, D) or (N, D). None: log 0 = -inf.
        reverse, cu_seqlens, resets, return_state: as in :func:`linear_scan`.

    Returns:
        log h, and with ``return_state`` the logarithm of the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`.

    Source: Heinsen 2023, "Efficient Parallelization of a Ubiquitous Sequential Computation";
    computed here by a compensated recurrence instead of two cumulative sums.

    >>> import torch, msrnn_ops as ms
    >>> log_h = ms.log_scan(torch.zeros(1, 4, 1), torch.full((1, 4, 1), 0.25).log())
    >>> log_h[0, -1].exp()
    tensor([1.])
    """
    h, last = run(LOG, (log_a, log_b), log_h0, cu_seqlens, resets, reverse, return_state)
    return (h, last) if return_state else h


# fmt: off
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[GateOptions]) -> Tensor: ...
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[GateOptions]) -> WithState: ...
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[GateOptions]) -> Tensor | WithState: ...
# fmt: on
def min_gru(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    r"""minGRU, its gates fused with the scan over time.

    .. math:: h_t = (1 - z_t) h_{t-1} + z_t \phi(c_t), \quad z_t = \sigma(k_t)

    Args:
        gate: pre-activation k of the update gate, (B, T, D), any strides (a chunk of a projection
            is not copied); float32, float64, bfloat16 or float16; any value, +-1e4 is exact.
        candidate: pre-activation c, in the shape and dtype of ``gate``.
        h0: the initial *state*, in linear space, any sign, never a pre-activation; (B, D), or
            (N, D) with ``cu_seqlens``. None: 0.
        activation: ``"g"``, the log-space form's phi(x) = x + 1/2 for x >= 0 and sigma(x)
            otherwise; or ``"identity"``, the vanilla form.
        reverse, cu_seqlens, resets, return_state: as in :func:`linear_scan`.

    Returns:
        h, and with ``return_state`` the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`; ValueError for an unknown activation.

    16-bit inputs are widened; gates and carry are float32. Under autocast it runs in the dtype of
    its inputs, the widest if they differ.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1; the log-space form is in
    its appendix.

    >>> import torch, msrnn_ops as ms
    >>> h, last = ms.min_gru(torch.zeros(1, 3, 1), torch.ones(1, 3, 1), return_state=True)
    >>> h.flatten(), last
    (tensor([0.7500, 1.1250, 1.3125]), tensor([[1.3125]]))
    """
    switches = (reverse, return_state)
    h, last = run(MIN_GRU, (gate, candidate), h0, cu_seqlens, resets, *switches, activation)
    return (h, last) if return_state else h


# fmt: off
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[GateOptions]) -> Tensor: ...
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[GateOptions]) -> WithState: ...
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[GateOptions]) -> Tensor | WithState: ...
# fmt: on
def min_gru_joint(
    projection: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    """:func:`min_gru` of one projection that holds gate and candidate side by side.

    Equal to ``min_gru(*projection.chunk(2, -1), ...)``; its backward fills one gradient buffer,
    where autograd would concatenate the gradients of two chunks.

    Args:
        projection: (B, T, 2 D), gate first.
        h0, activation, reverse, cu_seqlens, resets, return_state: as in :func:`min_gru`.

    Returns, raises, source: as :func:`min_gru`.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_gru_joint(torch.zeros(1, 2, 6)).shape
    torch.Size([1, 2, 3])
    """
    switches = (reverse, return_state)
    h, last = run(MIN_GRU_JOINT, (projection,), h0, cu_seqlens, resets, *switches, activation)
    return (h, last) if return_state else h


# fmt: off
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[GateOptions]) -> Tensor: ...
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[GateOptions]) -> WithState: ...
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[GateOptions]) -> Tensor | WithState: ...
# fmt: on
def min_lstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    r"""minLSTM with its two gates normalised to sum to 1, fused with the scan over time.

    .. math::
        h_t = \frac{f_t}{f_t + i_t} h_{t-1} + \frac{i_t}{f_t + i_t} \phi(c_t),
        \quad f_t = \sigma(\mathrm{forget}_t), \; i_t = \sigma(\mathrm{input}_t)

    Args:
        forget: pre-activation of the forget gate, (B, T, D), as ``gate`` of :func:`min_gru`.
        input: pre-activation of the input gate, in the shape and dtype of ``forget``.
        candidate: pre-activation c, likewise.
        h0, activation, reverse, cu_seqlens, resets, return_state: as in :func:`min_gru`.

    Returns:
        h, and with ``return_state`` the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`min_gru`.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2; the log-space form is in
    its appendix.

    >>> import torch, msrnn_ops as ms
    >>> zero, one = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> ms.min_lstm(zero, zero, one).flatten()
    tensor([0.7500, 1.1250])
    """
    inputs = (forget, input, candidate)
    switches = (reverse, return_state)
    h, last = run(MIN_LSTM, inputs, h0, cu_seqlens, resets, *switches, activation)
    return (h, last) if return_state else h


# fmt: off
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[GateOptions]) -> Tensor: ...
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[GateOptions]) -> WithState: ...
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[GateOptions]) -> Tensor | WithState: ...
# fmt: on
def min_lstm_joint(
    projection: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | WithState:
    """:func:`min_lstm` of one projection that holds forget, input and candidate side by side.

    Equal to ``min_lstm(*projection.chunk(3, -1), ...)``, with one gradient buffer.

    Args:
        projection: (B, T, 3 D), in that order.
        h0, activation, reverse, cu_seqlens, resets, return_state: as in :func:`min_gru`.

    Returns, raises, source: as :func:`min_lstm`.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_lstm_joint(torch.zeros(1, 2, 6)).shape
    torch.Size([1, 2, 2])
    """
    switches = (reverse, return_state)
    h, last = run(MIN_LSTM_JOINT, (projection,), h0, cu_seqlens, resets, *switches, activation)
    return (h, last) if return_state else h


def _step(
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h: Tensor,
    rows: Tensor | None,
    activation: str,
) -> Tensor:
    if rows is not None:
        inputs, rows, identity, namespace = checks.row_step(op, inputs, h, rows, activation)
        if namespace is None:
            return op.plain_step(inputs, h, rows, identity)
        return STEPS[namespace, op.name](*inputs, h, rows, identity)
    caller = f"{op.name}_step"
    tokens, before = checks.scan_step(caller, op, inputs, h)
    _, last = run(op, tokens, before, None, None, False, True, activation, caller, "h")
    return last.to(h.dtype) if h.dim() == 2 else last.to(h.dtype).reshape(h.shape)


def min_gru_step(
    gate: Tensor,
    candidate: Tensor,
    h: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "g",
) -> Tensor:
    """One token of :func:`min_gru`: the state after it, in the dtype of ``h``.

    Args:
        gate, candidate: pre-activations, (B, D), of one dtype.
        h: state before the token, (B, D), in that dtype or the accumulation dtype.
        rows: (B,) int32 or int64: row i of the batch uses row ``rows[i]`` of an h that may have
            more of them, and changes it in place (``conv_state_indices`` of causal-conv1d). h is
            then in the accumulation dtype, float32 or, for float64, that, and its rows may lie
            apart. -1 is a row that does nothing and returns 0. There is no gradient. None: row i
            uses row i, and h stays as it is.
        activation: as in :func:`min_gru`.

    Raises:
        TypeError, ValueError: as :func:`min_gru`; on a CPU a row out of range, and two that are the
            same, before anything is written (on a GPU and in a compiled function, where the numbers
            are not looked at beforehand, these do nothing). RuntimeError: a gradient is asked for
            with rows.

    Source: Feng et al. 2024, section 3.1, the sequential form.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_gru_step(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    tensor([[0.7500]])

    The last of three requests, alone:

    >>> h = torch.zeros(3, 1)
    >>> out = ms.min_gru_step(torch.zeros(1, 1), torch.ones(1, 1), h, rows=torch.tensor([2]))
    >>> h.flatten()
    tensor([0.0000, 0.0000, 0.7500])
    """
    return _step(MIN_GRU, (gate, candidate), h, rows, activation)


def min_lstm_step(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "g",
) -> Tensor:
    """One token of :func:`min_lstm`: the state after it, in the dtype of ``h``.

    Args:
        forget, input, candidate: pre-activations, (B, D), of one dtype.
        h, rows: as in :func:`min_gru_step`.
        activation: as in :func:`min_gru`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`min_gru_step`.

    Source: Feng et al. 2024, section 3.2, the sequential form.

    >>> import torch, msrnn_ops as ms
    >>> zero = torch.zeros(1, 1)
    >>> ms.min_lstm_step(zero, zero, zero + 1, zero)
    tensor([[0.7500]])
    """
    return _step(MIN_LSTM, (forget, input, candidate), h, rows, activation)
