"""The layers of msrnn_ops.nn over a sequence whose time axis is sharded across ranks.

The recurrences are the scans of this package. A causal convolution over K steps needs the K - 1
inputs before its shard, of one rank or, where shards are shorter than that, of several: one
all-gather brings the last K - 1 inputs of every rank. A rank sends (K - 1)·(B·D + 1) numbers in the
dtype of the inputs, whatever T; backward adds up as many for each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from msrnn_ops import convolution, errors
from msrnn_ops.distributed import scan
from msrnn_ops.exchange import Exchange
from msrnn_ops.nn import MinGRU, MinLSTM, MinRNNBlock, WholeTime

_Module = TypeVar("_Module", bound=nn.Module)


class _Gather(torch.autograd.Function):
    """What each rank has, (ranks, ...); a gradient is the sum of those on all ranks."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scan.refuse_batched("MinRNNBlock", grad)
        return None, ctx.exchange.total(grad)[ctx.exchange.rank]


@dataclass(frozen=True)
class TimeShards(WholeTime):
    """The time axis of a layer's inputs, sharded over the ranks of a group."""

    group: dist.ProcessGroup
    whole = False

    def joint(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """The op of the same name over these ranks."""
        return partial(getattr(scan, op.__name__), group=self.group)

    def local(self, cu_seqlens: Tensor, steps: int) -> Tensor:
        exchange = Exchange.among("shard_time", self.group)
        lengths = exchange.gather(cu_seqlens.new_full((1,), steps))
        return cu_seqlens - lengths[: exchange.rank].sum()

    def real_before(self, valid: Tensor) -> Tensor:
        exchange = Exchange.among("shard_time", self.group)
        found = exchange.gather(valid.any(1).long())
        return found[: exchange.rank].sum(0).unsqueeze(1) > 0

    def convolve(
        self,
        conv: nn.Conv1d,
        first: Tensor,
        y: Tensor,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scan.check_plain("MinRNNBlock", first, y)
        exchange = Exchange.among("MinRNNBlock", self.group)
        if cu_seqlens is None:
            before, last = self._before(exchange, first, y, resets, valid)
            return convolution.causal(conv, torch.cat([before, y], 1), valid, resets), last
        before, _ = self._before(exchange, torch.zeros_like(first[:1]), y, None, None)
        ends = self.local(cu_seqlens, y.shape[1])
        out, last = convolution.packed(conv, torch.cat([before, y], 1), first, ends)
        # Of sequences without steps at the very start, too, which no step here ends.
        here = (ends <= y.shape[1]) & ((ends > 0) if exchange.rank else True)
        last = torch.where(here[1:, None, None], last, 0.0)
        return out, cast(Any, _Gather).apply(exchange, last).sum(0)

    def _before(
        self,
        exchange: Exchange,
        first: Tensor,
        y: Tensor,
        resets: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The K - 1 inputs before this rank's y, and the last K - 1 of all ranks."""
        batch, steps, width = first.shape
        if steps == 0:
            return first, first
        real = torch.ones_like(y[..., 0], dtype=torch.bool) if valid is None else valid
        rows, real = F.pad(y, (0, 0, steps, 0)), F.pad(real, (steps, 0))
        tail, known = convolution.last_rows(rows, steps, real, resets)
        # What is real travels with the rest, in its dtype.
        found = torch.cat([tail.flatten(1), cast(Tensor, known).to(y.dtype)], 1)
        found = cast(Any, _Gather).apply(exchange, found).transpose(0, 1)
        tails, reals = found.split([steps * width, steps], 2)
        tails = tails.reshape(batch, exchange.ranks * steps, width)
        rows = torch.cat([first, tails], 1)
        real = torch.cat([torch.ones_like(reals[:, 0]), reals.flatten(1)], 1).detach() > 0
        earlier = torch.arange(real.shape[1], device=y.device) < (1 + exchange.rank) * steps
        before, _ = convolution.last_real(rows, real & earlier, steps)
        last, _ = convolution.last_real(rows, real, steps)
        return before, last

    def __deepcopy__(self, memo: object) -> TimeShards:
        return self  # process groups have no copies

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a layer whose time is sharded cannot be pickled, as process groups cannot: save its "
            "state_dict, or call shard_time(module, None) first"
        )


def shard_time(module: _Module, group: dist.ProcessGroup | DeviceMesh | None) -> _Module:
    """Tells the layers in a module that the time of their inputs is sharded over ranks.

    From then on every :class:`msrnn_ops.nn.MinGRU`, ``MinLSTM`` and ``MinRNNBlock`` in it takes the
    steps of this rank, in the order of the ranks, of which there may be none, and returns its
    outputs of these steps. ``hx``, ``h_n``, ``BlockState`` and ``cu_seqlens`` are those of the
    whole sequence, the same on every rank; ``resets`` and ``valid`` those of the steps here. Every
    rank of the group calls the module, forward and backward. What else in it mixes over time, such
    as attention, is not told.

    Args:
        module: changed in place. Its copies are sharded, too; pickling it is an error.
        group: a process group or a mesh of one dimension. None: time is not sharded any more.

    Returns:
        The module.

    Gradients are those of the sum of all ranks' losses: those of parameters, ``hx`` and a
    ``BlockState`` are to be added up over the ranks. DistributedDataParallel and ``fully_shard``
    over all ranks average them. For the mean over all tokens a rank's loss then is the sum over its
    own tokens, times the number of ranks, over the number of all tokens; where all ranks have
    equally many, this is the mean over its own tokens.

    Dropout draws from each rank's generator: ranks that are seeded alike drop alike.

    Raises:
        ValueError: no such layer in the module, a mesh of several dimensions; later ``step``.
        TypeError: another group; later a PackedSequence. RuntimeError: torch.distributed is not
            initialised, or, later, a rank failed.

    Source: for the convolution a halo exchange; for the scans as
    :func:`msrnn_ops.distributed.linear_scan`.

    >>> import msrnn_ops as ms, torch.distributed as dist
    >>> from msrnn_ops.distributed import shard_time
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> model = shard_time(ms.nn.MinRNNBlock(16), dist.group.WORLD)
    >>> y = model(torch.randn(2, 7, 16))  # the 7 steps of this rank
    >>> dist.destroy_process_group()
    """
    layers = [x for x in module.modules() if isinstance(x, MinGRU | MinLSTM | MinRNNBlock)]
    if not layers:
        raise ValueError(
            "shard_time: expected a module with layers of msrnn_ops.nn, got "
            f"{type(module).__name__}"
        )
    time_axis = WholeTime()
    if group is not None:
        if not isinstance(group, dist.ProcessGroup | DeviceMesh):
            raise errors.kind("shard_time", "group", "a process group, a mesh or None", group)
        if Exchange.among("shard_time", group).ranks > 1:
            group = group.get_group() if isinstance(group, DeviceMesh) else group
            time_axis = TimeShards(group)
    for layer in layers:
        layer.time_axis = time_axis
    return module
