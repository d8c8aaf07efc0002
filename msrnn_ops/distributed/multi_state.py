"""Multi-state attention whose heads are sharded over the ranks of a process group.

Every rank has some query heads, the key-value heads that they share, and a state of these alone.
A policy of scope "layer" drops one token for all heads, so ranks must agree: each sums the
attention over its own heads, one all-gather brings these sums, and every rank adds them up by the
same kernel, in one order. The total has the same bits everywhere, and so has the choice. (An
all-reduce would choose its order by the size of the message.) It differs from the sum on one device
in rounding alone.

A rank contributes 4·B·(N+1) bytes a layer and token, 4·B·(N+1+T) for a prompt of T tokens; nothing
where heads decide for themselves (scope "head") or by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msrnn_ops import multi_state, multi_state_device, reference
from msrnn_ops.distributed.exchange import Exchange, Group
from msrnn_ops.distributed.scan import _check_plain
from msrnn_ops.multi_state import MultiState


def _total(exchange: Exchange, scores: Tensor) -> Tensor:
    return exchange.gather(scores).sum(0)


def _alone(exchange: Exchange, state: MultiState) -> bool:
    """Whether this rank's heads choose without the others."""
    multi_state._check_state(exchange.caller, state, None)
    policy = state.policy
    return exchange.ranks == 1 or policy.scope == "head" or policy.score == "position"


def attend_evict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    scale: float | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`msrnn_ops.attend_evict` with heads sharded over ranks: one token of every row.

    Every rank of the group calls it with the same rows and its own heads. All ranks drop the same
    token, which is the one that a single device with all heads would drop, unless the scores of
    several are equal but for rounding.

    Args:
        q, k, v: of this rank's heads, (B, Hq, Dh) and (B, Hkv, Dh). Key-value heads may also be on
            several ranks, each with some of their query heads.
        state: of this rank's heads, with the same policy on every rank; changed in place.
        scale: as there.
        group: a process group or a mesh of one dimension. None: all ranks.

    Returns:
        (B, Hq, Dh) of this rank's heads.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a rank failed; then the token waits,
            and a new call replaces it. TypeError, ValueError: as there.

    Source: Oren et al. 2024, "Transformers are Multi-State RNNs", Algorithm 1; heads are sharded as
    in Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    exchange = Exchange.among("attend_evict", group)
    _check_plain("attend_evict", q, k, v)
    if _alone(exchange, state):
        return multi_state.attend_evict(q, k, v, state, scale=scale)
    out, scores = multi_state.attend_scores(q, k, v, state, scale=scale)
    multi_state.evict(state, _total(exchange, scores))
    return out


def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`msrnn_ops.attend_prompt` with heads sharded over ranks, as :func:`attend_evict` here.

    ``valid`` is the same on every rank.
    """
    exchange = Exchange.among("attend_prompt", group)
    _check_plain("attend_prompt", q, k, v)
    if _alone(exchange, state):
        return multi_state.attend_prompt(q, k, v, state, valid=valid, scale=scale)
    factor = multi_state._checked_prompt(q, k, v, state, valid, scale)
    kept = tuple(state._tensors())
    multi_state._refuse_gradient("attend_prompt", (q, k, v))

    def total(scores: Tensor) -> Tensor:
        return _total(exchange, scores)

    if multi_state._namespace("attend_prompt", q) is None:
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend_prompt(q, k, v, state, valid, factor, total)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = multi_state._without_waiting(state.position, state.free)
        on_cpu, on_device = multi_state._prompt_output, multi_state_device.prompt_output
        attended = on_cpu if q.is_cpu else on_device
        with torch.autocast(q.device.type, enabled=False):
            out = attended(q, k, v, valid, state.keys, state.values, before, factor)
            rest: tuple[Any, ...] = (*kept, *state.policy._numbers, factor, total)
            multi_state_device.store_prompt(q, k, v, valid, *rest)
        return out

    if torch.compiler.is_compiling():
        return run(q, k, v)
    torch.autograd.graph.increment_version([x for x in kept if not x.is_inference()])
    return multi_state._as_kernel(run)(q, k, v)
