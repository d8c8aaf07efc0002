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

from functools import partial

import torch
from torch import Tensor

from msrnn_ops import checks, multi_state, reference
from msrnn_ops.distributed.scan import check_plain
from msrnn_ops.exchange import Exchange, Group
from msrnn_ops.operators.in_place import refuse_gradient
from msrnn_ops.operators.multi_state import as_kernel, prompt_function
from msrnn_ops.state import MultiState


def _total(exchange: Exchange, scores: Tensor) -> Tensor:
    return exchange.gather(scores).sum(0)


def _alone(exchange: Exchange, state: MultiState) -> bool:
    """Whether this rank's heads choose without the others."""
    checks.check_state(exchange.caller, state)
    policy = state.policy
    return exchange.ranks == 1 or policy.scope == "head" or policy.score == "position"


def attend_evict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    rows: Tensor | None = None,
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
        rows, scale: as there; rows are the same on every rank.
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
    check_plain("attend_evict", q, k, v)
    if _alone(exchange, state):
        return multi_state.attend_evict(q, k, v, state, rows=rows, scale=scale)
    out, scores = multi_state.attend_scores(q, k, v, state, rows=rows, scale=scale)
    multi_state.evict(state, _total(exchange, scores), rows=rows)
    return out


def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    valid: Tensor | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`msrnn_ops.attend_prompt` with heads sharded over ranks, as :func:`attend_evict` here.

    ``valid``, ``rows`` and ``cu_seqlens`` are the same on every rank.
    """
    exchange = Exchange.among("attend_prompt", group)
    check_plain("attend_prompt", q, k, v)
    if _alone(exchange, state):
        return multi_state.attend_prompt(
            q, k, v, state, valid=valid, rows=rows, cu_seqlens=cu_seqlens, scale=scale
        )
    rows, scale, namespace = checks.prompt(q, k, v, state, valid, rows, cu_seqlens, scale)
    refuse_gradient("attend_prompt", "msrnn_ops.attend_sequence", (q, k, v))
    total = partial(_total, exchange)
    if namespace is None:
        return reference.attend_prompt(q, k, v, state, valid, cu_seqlens, rows, scale, total)
    kept = state.tensors()
    args = (q, k, v, valid, cu_seqlens, rows, *kept, *state.policy.numbers, scale)
    function = prompt_function(q.is_cpu, total)
    if torch.compiler.is_compiling():
        with torch.autocast(q.device.type, enabled=False):
            return function(*args)
    torch.autograd.graph.increment_version([x for x in kept if not x.is_inference()])
    return as_kernel(function)(*args)
