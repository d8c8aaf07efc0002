"""The scans over a sequence whose time axis is sharded across the ranks of a process group.

A shard maps the state that enters it to the state that leaves it, and that map is affine:

    leaving = decay * entering + last,

`decay` the product of its steps' decays, `last` its last state from 0. Every rank finds both for
its own shard, one all-gather brings those of all ranks, a scan over ranks gives the state that
enters each, and the shard is scanned again from there. Backward is the mirror image: the adjoint
that leaves a shard towards earlier ones is affine in the one that comes from later ones, with the
same decay.

A rank sends 2·B·D numbers forward and B·D backward, whatever T, in the accumulation dtype, and
B·D more backward where a last state is returned. With cu_seqlens B is 1, 8 bytes more tell where a
shard starts, and last states are N·D numbers that are added up over ranks, forward and backward.

Local passes read and write 20 tensors of the shard's size for forward and backward of min_gru,
where one device has 9 (bench/README.md): the ops write all of h where the last state is wanted.

Tried and rejected: summaries in blocks of 512 channels, which pay the latency of the exchange once
each; in that model they hide at most 1.5 % of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from typing_extensions import Unpack

from msrnn_ops import backend, checks, errors
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.exchange import Exchange, Group
from msrnn_ops.operators.scan import (
    DECAY,
    LINEAR,
    LOG,
    MIN_GRU,
    MIN_GRU_JOINT,
    MIN_LSTM,
    MIN_LSTM_JOINT,
    OPERATORS,
    RECURRENCES,
    Recurrence,
    borders,
    sequences_of,
)
from msrnn_ops.reference import accumulation_dtype
from msrnn_ops.scan import GateOptions, ScanOptions, WithState, in_leading, run
from msrnn_ops.transforms import batched_outside_of_autograd

# So many channels or more are summarised in two halves: the summary of one is on its way while the
# other is scanned. More parts would pay the latency of the exchange once each.
_CHANNELS_TO_HALVE = 1024
_PLAIN = {MIN_GRU_JOINT.name: MIN_GRU, MIN_LSTM_JOINT.name: MIN_LSTM}


@dataclass(frozen=True)
class _Shard:
    """This rank's part in a call. Places are ranks, counted in the direction of the scan."""

    name: str
    namespace: str | None
    exchange: Exchange
    reverse: bool
    flags: tuple[bool, ...]
    return_state: bool

    @property
    def op(self) -> Recurrence:
        return _OPS[self.name]

    @property
    def place(self) -> int:
        rank, ranks = self.exchange.rank, self.exchange.ranks
        return ranks - 1 - rank if self.reverse else rank

    def by_place(self, x: Tensor) -> Tensor:
        """What each rank has: (places, ...)."""
        return self.arrived(self.exchange.send(x))

    def arrived(self, x: Tensor) -> Tensor:
        x = self.exchange.wait(x)
        return x.flip(0) if self.reverse else x

    def scan(
        self,
        op: Recurrence,
        inputs: Sequence[Tensor],
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        options = {"cu_seqlens": cu_seqlens, "resets": resets, "reverse": self.reverse}
        return _local(op, inputs, h0, self.flags if op.flags else (), **options)

    def gradients(
        self,
        grad_h: Tensor | None,
        grad_last: Tensor,
        inputs: Sequence[Tensor],
        h: Tensor,
        h0: Tensor,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Of the inputs and of h0, by this rank's steps alone."""
        op = self.op
        if self.namespace is None:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (*inputs, h0)]
                h, last = self.scan(op, leaves[:-1], leaves[-1], cu_seqlens, resets)
                total = (last * grad_last).sum()
                total = total if grad_h is None else total + (h * grad_h).sum()
                if not total.requires_grad:  # there are no steps and no states
                    return tuple(map(torch.zeros_like, leaves))
                return torch.autograd.grad(total, leaves, materialize_grads=True)
        backward = OPERATORS[self.namespace, op.name].backward
        saved = inputs[: op.saved]
        args = (*saved, h, h0, cu_seqlens, resets, self.reverse, *self.flags)
        return backward(grad_h, grad_last, *args)

    def cuts(self, resets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Whether resets keep what enters here from leaving, and what leaves; (B, 1) bools.

        A reset cuts the border before its step. Where the scan is reversed, that of the first step
        here lies behind it, on the way to whichever rank has the step before.
        """
        if resets is None:
            return None, None
        if not self.reverse:
            return resets.any(1, keepdim=True), None
        first = F.pad(resets, (0, 1))[:, 0]
        steps = self.by_place(first.long() + min(resets.shape[1], 1))
        out = (first & (steps[self.place + 1 :] > 0).any(0)).unsqueeze(1)
        return resets[:, 1:].any(1, keepdim=True) | out, out


def _local(
    op: Recurrence,
    inputs: Sequence[Tensor],
    h0: Tensor | None,
    flags: tuple[bool, ...],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The op on this rank."""
    activation = ("identity" if flags[0] else "g") if flags else None
    cu_seqlens, resets = options.get("cu_seqlens"), options.get("resets")
    reverse = options.get("reverse", False)
    return run(op, tuple(inputs), h0, cu_seqlens, resets, reverse, True, activation)


@dataclass(frozen=True)
class _Packing:
    """Packed sequences as this rank sees them. All are tensors: no host waits for a device."""

    cu_seqlens: Tensor  # of the steps here
    begins: Tensor  # (N, 1) bool, in the direction of the scan: begins here
    ends: Tensor  # ends here
    enters: Tensor  # comes from the place before: at most one
    leaves: Tensor  # goes on to the place after: at most one
    places: Tensor  # cu_seqlens of places: a sequence lies on some of them


def _packing(shard: _Shard, cu_seqlens: Tensor, time: int) -> _Packing:
    here = torch.full((1,), time, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    lengths = shard.by_place(here)[:, 0]
    if not torch.compiler.is_compiling() and cu_seqlens.is_cpu:
        borders(shard.name, cu_seqlens, int(lengths.sum()))
    before, total = lengths.cumsum(0) - lengths, lengths.sum()
    starts = total - before - lengths if shard.reverse else before
    ends = starts + lengths
    start, end = starts[shard.place], ends[shard.place]
    first, last = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    some = first < last
    has_first = some & (start <= first) & (first < end)
    has_last = some & (start < last) & (last <= end)
    over_start, over_end = ((first < border) & (border < last) for border in (start, end))
    if shard.reverse:
        has_first, has_last, over_start, over_end = has_last, has_first, over_end, over_start
    if shard.place == 0:  # where empty sequences begin and end
        has_first, has_last = has_first | ~some, has_last | ~some
    local = (cu_seqlens - start).clamp(0, time)
    spanned = ((first < starts) & (ends < last)).any(0)  # by a sequence from before to after
    place = torch.arange(len(lengths), device=cu_seqlens.device)
    cuts = torch.where(spanned, len(lengths), place).sort().values
    places = torch.cat([cuts, cuts.new_full((1,), len(lengths))])  # the first cut is 0
    return _Packing(local, has_first, has_last, over_start, over_end, places)


def _decay(shard: _Shard, op: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
    """The product of the decays of all steps here, (B, D); of log_scan its logarithm."""
    x = inputs[0]
    zero, one = (-torch.inf, 0.0) if op is LOG else (0.0, 1.0)
    # Read, but not from memory; not of channels, too, which kernels would copy first.
    nothing = x.new_full((1, 1, x.shape[2]), zero).expand(x.shape)
    state = x.new_full((x.shape[0], x.shape[2]), one, dtype=accumulation_dtype(x.dtype))
    identity = (True,) if op.flags else ()
    return _local(op, (*inputs[:-1], nothing), state, identity, reverse=shard.reverse)[1]


def _summaries(
    shard: _Shard,
    inputs: Sequence[Tensor],
    h0: Tensor,
    packing: _Packing | None,
    resets: Tensor | None,
    through: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decay and last state of each place's shard, (places, B, D) each.

    Of packed sequences those of the one that goes on to the next place: its decay is 0 where it
    begins here.
    """
    op, parts = shard.op, inputs
    if op.parts > 1:
        op, parts = _PLAIN[op.name], inputs[0].chunk(op.parts, -1)
    zero = op.start
    pending = []
    channels = h0.shape[1]
    at_once = -(-channels // 2) if channels >= _CHANNELS_TO_HALVE else max(channels, 1)
    for i in range(0, max(channels, 1), at_once):
        some = [x[..., i : i + at_once] for x in parts]
        state = h0[:, i : i + at_once]
        local = None if packing is None else packing.cu_seqlens
        last, decay = shard.scan(op, some, state, local, resets)[1], _decay(shard, op, some)
        if op is not LOG:  # a product beyond all numbers times a state of 0 is no NaN
            largest = torch.finfo(decay.dtype).max
            decay = decay.clamp(-largest, largest)
        if packing is not None:
            spans = (packing.enters & packing.leaves).any(0)
            decay = torch.where(spans, decay, zero)
            last = _row(last, packing.leaves, zero)
        if through is not None:
            decay = torch.where(through, zero, decay)
        if out is not None:
            last = torch.where(out, zero, last)
        pending.append(shard.exchange.send(torch.stack([decay, last])))
    found = torch.cat([shard.arrived(x) for x in pending], -1)
    return found[:, 0], found[:, 1]


def _row(x: Tensor, chosen: Tensor, otherwise: float) -> Tensor:
    """The row of x (N, D) that is chosen (N, 1), as (1, D)."""
    if x.shape[0] == 0:
        return x.new_full((1, x.shape[1]), otherwise)
    row = x.gather(0, chosen.int().argmax(0, keepdim=True).expand(1, x.shape[1]))
    return torch.where(chosen.any(0), row, otherwise)


def _over_places(
    op: Recurrence, decay: Tensor, value: Tensor, packing: _Packing | None, reverse: bool = False
) -> Tensor:
    """A scan over the first dimension of (places, B, D)."""
    inputs = (decay.transpose(0, 1), value.transpose(0, 1))
    places = None if packing is None else packing.places
    return _local(op, inputs, None, (), reverse=reverse, cu_seqlens=places)[0].transpose(0, 1)


def _tied(x: Tensor, other: Tensor) -> Tensor:
    """x, which torch.compile then computes where it reads x, and not before it has the other.

    So exchanges come in the same order on every rank, whether it uses what they bring or not.
    """
    if not torch.compiler.is_compiling():
        return x
    never = other.isnan().any() & other.isfinite().all()
    return torch.where(never, 0.0, x)


def _forward(
    shard: _Shard,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    h0: Tensor,
    *inputs: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """h of this rank, the last state of the whole sequence, and what backward reads."""
    op, place = shard.op, shard.place
    packing = None if cu_seqlens is None else _packing(shard, cu_seqlens, inputs[0].shape[1])
    nothing = torch.full_like(h0, op.start)
    if packing is not None:
        first = torch.where(packing.begins, h0, nothing)
    else:
        first = nothing if place else h0
    through, out = shard.cuts(resets)
    decay, last = _summaries(shard, inputs, first, packing, resets, through, out)
    fold = LOG if op is LOG else LINEAR
    leaving = _over_places(fold, decay, last, packing)
    # Every place reads what all have sent, also where nothing comes before it: of what is not read
    # torch.compile drops the exchange, and the other ranks wait for it.
    start = h0 if packing is None else torch.zeros_like(leaving[0])
    state = torch.cat([start.unsqueeze(0), leaving])[place]
    if packing is not None:
        state = torch.where(packing.enters, state, first)
    local = None if packing is None else packing.cu_seqlens
    h, last = shard.scan(op, inputs, state, local, resets)
    if packing is None:
        last = leaving[-1].clone()
    elif shard.return_state:
        last = shard.exchange.total(torch.where(packing.ends, last, 0.0))
    weight = decay
    if op is LOG:  # of the entering state in the leaving one, which are logarithms
        before = torch.cat([torch.full_like(leaving[:1], -torch.inf), leaving[:-1]])
        weight = (decay + before - leaving).exp().nan_to_num(0.0)
    if packing is not None and shard.return_state:
        weight = _tied(weight, last)  # backward reads the weights on every rank
    borders = () if packing is None else tuple(vars(packing).values())
    return h, last, (weight, state, h, resets, out, *inputs, *borders)


class _Sharded(torch.autograd.Function):
    """An op over all shards, its backward as the head of this file says."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: _Shard,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        h0: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h, last, saved = _forward(shard, cu_seqlens, resets, h0, *inputs)
        ctx.save_for_backward(*saved)
        ctx.shard, ctx.inputs = shard, len(inputs)
        ctx.set_materialize_grads(False)
        return h, last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(f"{ctx.shard.name}: no second derivatives over ranks")
        refuse_batched(ctx.shard.name, grad_h, grad_last)
        shard = ctx.shard
        place = shard.place
        weight, state, h, resets, out, *rest = ctx.saved_tensors
        inputs, borders = rest[: ctx.inputs], rest[ctx.inputs :]
        packing = _Packing(*borders) if borders else None
        local = None if packing is None else packing.cu_seqlens
        zeros = torch.zeros_like(state)
        of_last = zeros if grad_last is None else grad_last

        def gradients(of_last: Tensor) -> tuple[Tensor, ...]:
            return shard.gradients(grad_h, of_last, inputs, h, state, local, resets)

        # Every place reads what all have sent, as in forward.
        if packing is None:
            here = zeros
            adjoint = gradients(here)[-1]
            found = shard.by_place(torch.stack([adjoint, of_last][: 1 + shard.return_state]))
            adjoints = found[:, 0]
            final = found[:, 1].sum(0) if shard.return_state else zeros
        else:
            if shard.return_state:
                tied = of_last if grad_h is None else _tied(of_last, grad_h[:, :1])
                here = torch.where(packing.ends, shard.exchange.total(tied), 0.0)
            else:
                here = zeros
            adjoint = _row(gradients(here)[-1], packing.enters, 0.0)
            adjoints, final = shard.by_place(adjoint), torch.zeros_like(adjoint)
        adjoints = torch.cat([adjoints[1:], final.unsqueeze(0)])
        decays = torch.cat([weight[1:], torch.zeros_like(weight[:1])])
        later = _over_places(LINEAR, decays, adjoints, packing, reverse=True)[place]
        if out is not None:
            later = torch.where(out, 0.0, later)
        here = later if packing is None else torch.where(packing.leaves, later, here)
        *grads, grad_h0 = gradients(here)
        if packing is not None:
            grad_h0 = torch.where(packing.begins, grad_h0, 0.0)
        elif place:
            grad_h0 = zeros
        return None, None, None, grad_h0, *grads


def check_plain(name: str, *tensors: Tensor | None) -> None:
    """No DTensors, and nothing that would ask for derivatives in a way that collectives drop."""
    given = [x for x in tensors if isinstance(x, Tensor)]
    if any(is_distributed(x) for x in given):
        raise TypeError(
            f"{name}: expected plain tensors over ranks, this rank's part (x.to_local()), got a "
            "DTensor"
        )
    if torch.compiler.is_compiling():
        return
    forward = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in given
    )
    if forward or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"{name}: no forward mode and no torch.func over ranks")


def refuse_batched(name: str, *grads: Tensor | None) -> None:
    """Collectives would send the batch as if it were one gradient."""
    if batched_outside_of_autograd(*grads):
        raise NotImplementedError(f"{name}: no batched gradients (is_grads_batched) over ranks")


def _run(
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    return_state: bool,
    group: Group,
    activation: str | None = None,
) -> Tensor | WithState:
    """Checks the arguments and runs."""
    exchange = Exchange.among(op.name, group)
    if exchange.ranks == 1:
        h, last = run(op, inputs, h0, cu_seqlens, resets, reverse, return_state, activation)
        return (h, last) if return_state else h
    check_plain(op.name, *inputs, h0)
    inputs, h0, resets, flags, leading = checks.scan(
        op, inputs, h0, cu_seqlens, resets, reverse, return_state, activation, whole=False
    )
    x = inputs[0]
    if x.is_complex():
        raise errors.dtype(op.name, op.inputs[0], "a real dtype over ranks", x.dtype)
    if h0 is None:
        states = sequences_of(x, cu_seqlens), x.shape[2] // op.parts
        h0 = x.new_full(states, op.start, dtype=accumulation_dtype(x.dtype))
    shard = _Shard(
        op.name,
        backend.namespace(op.name, x.device),
        exchange,
        reverse,
        flags,
        return_state,
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (h0, *inputs)):
        h, last = cast(Any, _Sharded).apply(shard, cu_seqlens, resets, h0, *inputs)
    else:
        h, last, _ = _forward(shard, cu_seqlens, resets, h0, *inputs)
    if leading is not None:
        h, last = in_leading(h, last, leading, cu_seqlens)
    return (h, last) if return_state else h


class ShardedScanOptions(ScanOptions, total=False):
    group: Group


class ShardedGateOptions(GateOptions, total=False):
    group: Group


# fmt: off
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedScanOptions]) -> Tensor: ...
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedScanOptions]) -> WithState: ...
@overload
def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedScanOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.linear_scan` over a sequence whose time is sharded across ranks.

    Every rank of the group calls it, forward and backward, with its own steps, in the order of the
    ranks; there may be none.

    Args:
        a, b: the steps of this rank, (B, T of this rank, D).
        h0: the state before the whole sequence, (B, D) or (N, D), the same on every rank.
        reverse, return_state: as there, of the whole sequence.
        cu_seqlens: as there, of the whole sequence, the same on every rank.
        resets: as there, of the steps of this rank, (B, T of this rank).
        group: a process group or a mesh of one dimension. None: all ranks.

    Returns:
        h of this rank's steps; with ``return_state`` also the last state of the whole sequence, the
        same bits on every rank. Both are those of one device but for rounding, and bit by bit where
        the group has one rank.

    Gradients are those of the sum of all ranks' losses, and are asked for on all ranks or on none.
    That of h0 lies on the ranks where
    sequences begin (without cu_seqlens the first, with ``reverse`` the last), elsewhere it is 0.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a rank failed. TypeError, ValueError:
            as there, or DTensors. NotImplementedError: a second derivative, forward mode,
            torch.func.

    Source: the exchange of Blelloch's scan over blocks ("Prefix Sums and Their Applications", 1990,
    section 1.3), one all-gather in place of its tree.
    """
    return _run(LINEAR, (a, b), h0, cu_seqlens, resets, reverse, return_state, group)


# fmt: off
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedScanOptions]) -> Tensor: ...
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedScanOptions]) -> WithState: ...
@overload
def decay_scan(log_a: Tensor, b: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedScanOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.decay_scan` over ranks, as :func:`linear_scan` here."""
    return _run(DECAY, (log_a, b), h0, cu_seqlens, resets, reverse, return_state, group)


# fmt: off
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedScanOptions]) -> Tensor: ...
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedScanOptions]) -> WithState: ...
@overload
def log_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedScanOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.log_scan` over ranks, as :func:`linear_scan` here."""
    return _run(LOG, (log_a, log_b), log_h0, cu_seqlens, resets, reverse, return_state, group)


# fmt: off
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedGateOptions]) -> Tensor: ...
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedGateOptions]) -> WithState: ...
@overload
def min_gru(gate: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedGateOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.min_gru` over ranks, as :func:`linear_scan` here."""
    inputs = (gate, candidate)
    return _run(MIN_GRU, inputs, h0, cu_seqlens, resets, reverse, return_state, group, activation)


# fmt: off
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedGateOptions]) -> Tensor: ...
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedGateOptions]) -> WithState: ...
@overload
def min_gru_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedGateOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.min_gru_joint` over ranks, as :func:`linear_scan` here."""
    inputs = (projection,)
    return _run(
        MIN_GRU_JOINT, inputs, h0, cu_seqlens, resets, reverse, return_state, group, activation
    )


# fmt: off
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedGateOptions]) -> Tensor: ...
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedGateOptions]) -> WithState: ...
@overload
def min_lstm(forget: Tensor, input: Tensor, candidate: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedGateOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.min_lstm` over ranks, as :func:`linear_scan` here."""
    inputs = (forget, input, candidate)
    return _run(MIN_LSTM, inputs, h0, cu_seqlens, resets, reverse, return_state, group, activation)


# fmt: off
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[False] = ..., **options: Unpack[ShardedGateOptions]) -> Tensor: ...
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: Literal[True], **options: Unpack[ShardedGateOptions]) -> WithState: ...
@overload
def min_lstm_joint(projection: Tensor, h0: Tensor | None = ..., *,
        return_state: bool, **options: Unpack[ShardedGateOptions]) -> Tensor | WithState: ...
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
    group: Group = None,
) -> Tensor | WithState:
    """:func:`msrnn_ops.min_lstm_joint` over ranks, as :func:`linear_scan` here."""
    inputs = (projection,)
    return _run(
        MIN_LSTM_JOINT, inputs, h0, cu_seqlens, resets, reverse, return_state, group, activation
    )


_OPS = {op.name: op for op in RECURRENCES}
