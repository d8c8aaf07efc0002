"""Multi-state attention: the public functions that attend and evict.

A call goes through its door in checks.py, then to the reference (reference.py) or to an operator
(operators/multi_state.py), whose kernels are in csrc/. A step on a CPU goes to the operator at
once, which checks as much in C++. Policy and MultiState are in state.py.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from msrnn_ops import backend, checks, reference
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators.in_place import is_as_it_lies, is_plain
from msrnn_ops.operators.multi_state import IN_PLACE, SEQUENCES
from msrnn_ops.state import MultiState, Policy

__all__ = [
    "MultiState",
    "Policy",
    "attend_evict",
    "attend_prompt",
    "attend_scores",
    "attend_sequence",
    "evict",
]


def _run(namespace: str, name: str, *args: Any) -> Any:
    """Calls an operator that changes a state."""
    if is_distributed(args[0]):
        args = checks.placed(name, args)
    return IN_PLACE[namespace, name](*args)


def _needs_no_checks(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, scale: float | None
) -> bool:
    """Whether the operator sees all that could be wrong with a call, in less time."""
    if type(state) is not MultiState or type(state.keys) is not Tensor or not is_plain():
        return False
    for x in (q, k, v):
        if type(x) is not Tensor or not x.is_cpu or x.is_neg():
            return False
    kept = state.tensors()
    for x in kept:
        if not x.is_cpu:
            return False
    if torch._C._any_requires_grad(q, k, v, *kept):
        return False
    if not backend.is_compiled("attend_evict", q):
        return False
    return q.dim() == 3 and q.shape[2] > 0 and (scale is None or checks.is_usual_scale(scale))


def attend_evict_unchecked(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, rows: Tensor | None, scale: float
) -> Tensor:
    """:func:`attend_evict` without the checks in Python, for engines whose devices never change.

    No gradient may be asked for, and q, k and v lie in memory on the device of the state.
    """
    namespace = backend.namespace("attend_evict", q.device)
    if namespace is None:
        return attend_evict(q, k, v, state, rows=rows, scale=scale)
    args = (q, k, v, rows, *state.tensors(), *state.policy.numbers, scale)
    try:
        out: Tensor = IN_PLACE[namespace, "attend_evict"].run_plain(args, q.is_cpu)
        return out
    except RuntimeError as error:
        refused = [error]
    _explain(refused.pop(), args, state)


def _explain(error: RuntimeError, args: tuple[Any, ...], state: MultiState) -> NoReturn:
    """The operator has refused a call and written nothing; the checks have the words for it."""
    q, k, v, rows = args[:4]
    try:
        if q.dim() == 4:
            q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
        checks.token("attend_evict", q, k, v, state, rows, args[-1])
        raise error
    finally:
        del error  # which holds this frame, and with it the tensors


class DecoderStep:
    """:func:`attend_evict` for a decoder that calls it again and again with one state.

    It takes q, k and v as decoders have them, (B, H, 1, Dh), and returns (B, 1, Hq, Dh), as they
    want it. What does not change from token to token is looked up once: the weights of two layers
    leave nothing of it in a processor's caches, where every look costs host time.
    """

    def __init__(self, state: MultiState, scale: float | None) -> None:
        self.state, self.scale = state, scale
        together = all(x.device == state.device for x in state.tensors())
        self._usual = together and scale is not None and checks.is_usual_scale(scale)
        self._on_cpu = state.device.type == "cpu"
        self._rest = (None, *state.tensors(), *state.policy.numbers, scale)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = self._usual and not torch.is_grad_enabled() and is_plain()
        plain = plain and is_as_it_lies(q) and is_as_it_lies(k) and is_as_it_lies(v)
        plain = plain and q.is_cpu == k.is_cpu == v.is_cpu == self._on_cpu
        if not plain or not backend.is_compiled("attend_evict", q):
            q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
            return attend_evict(q, k, v, self.state, scale=self.scale).unsqueeze(1)
        args = (q, k, v, *self._rest)
        try:
            out: Tensor = _COMPILED.run_plain(args, q.is_cpu)
            return out
        except RuntimeError as error:
            refused = [error]
        _explain(refused.pop(), args, self.state)


_COMPILED = IN_PLACE[backend.COMPILED, "attend_evict"]


def attend_evict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""One token of every row: store it, attend over the kept states, evict one.

    .. math:: o_h = \sum_s p_{hs} v_s, \quad p_h = \mathrm{softmax}_s(\mathrm{scale} \, q_h k_s)

    over the N kept states and the current token. Where more than N are there, the policy drops the
    one with the lowest score; in TOVA, :math:`\mathrm{mean}_h \, p_{hs}`, that may be the current
    one. Softmax, scores and comparison are float32, summed in a fixed order: results are bitwise
    the same in every run and for any number of threads. Rows are independent. Weights below 1e-38
    count as 0; a NaN score counts as the lowest.

    Args:
        q: queries, (B, Hq, Dh), Hq a multiple of Hkv, head h attends to key-value head
            h // (Hq / Hkv); in the dtype of the state, any strides (a view of a projection is not
            copied where head_dim is adjacent).
        k: keys after rotary embedding, (B, Hkv, Dh).
        v: values, (B, Hkv, Dh).
        state: changed in place; ``state.last_evicted`` tells what went.
        rows: (B,) int32 or int64: row i of the batch uses row ``rows[i]`` of a state that may have
            more of them, where it is, without a copy (``cache_batch_idx`` of flash-attn,
            ``conv_state_indices`` of causal-conv1d). -1 is a row that does nothing and whose output
            is 0, as padding in a CUDA graph wants it. None: row i uses row i.
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        (B, Hq, Dh) in the dtype of q, contiguous.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device, before anything is written; on a CPU
            also a row out of range and two that are the same. On a GPU and in a compiled function,
            where the numbers are not looked at beforehand, a row out of range does nothing, nor
            does the second of the same.
        RuntimeError: a gradient is asked for; :func:`attend_sequence` has one.

    Source: Oren et al. 2024, Algorithm 1 (TOVA) and section 3.2; H2O: Zhang et al. 2023,
    Algorithm 1.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.tova(4), batch=2, kv_heads=2, head_dim=16)
    >>> for _ in range(10):
    ...     q, k, v = torch.randn(2, 8, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    ...     out = ms.attend_evict(q, k, v, state)
    >>> out.shape, state.kept_positions().shape, state.seen
    (torch.Size([2, 8, 16]), torch.Size([2, 1, 4]), tensor([10, 10]))

    One request of two, as a serving engine has it:

    >>> out = ms.attend_evict(q[:1], k[:1], v[:1], state, rows=torch.tensor([1]))
    >>> state.seen
    tensor([10, 11])
    """
    if rows is None and _needs_no_checks(q, k, v, state, scale):
        scale = q.shape[2] ** -0.5 if scale is None else scale
        return attend_evict_unchecked(q, k, v, state, None, scale)
    rows, scale, namespace = checks.token("attend_evict", q, k, v, state, rows, scale)
    if namespace is None:
        return reference.attend_evict(q, k, v, rows, state, scale)
    policy = state.policy
    if policy.scope == "layer" and policy.score != "position" and is_distributed(q):
        out, scores = attend_scores(q, k, v, state, scale=scale)  # of heads on other ranks, too
        evict(state, scores)
        return out
    return _run(namespace, "attend_evict", q, k, v, rows, *state.tensors(), *policy.numbers, scale)


def attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of :func:`attend_evict`: store and attend, and decide nothing yet.

    Where heads are sharded over ranks, the scores are summed over the ranks before :func:`evict`.
    ``attend_scores`` and ``evict`` together equal ``attend_evict`` bit by bit. Called again before
    ``evict``, it replaces the token that waits.

    Args:
        q, k, v, state, rows, scale: as in :func:`attend_evict`.

    Returns:
        The output, (B, Hq, Dh), and the scores, (B, G, N+1) float32. A score is the attention to a
        slot, summed over the query heads, and 0 for empty slots and where a row does nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`attend_evict`.

    Source: Oren et al. 2024, Algorithm 1, before its selection.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.tova(2), batch=1, kv_heads=1, head_dim=8)
    >>> out, scores = ms.attend_scores(*torch.randn(3, 1, 1, 8), state)
    >>> scores
    tensor([[[1., 0., 0.]]])
    >>> ms.evict(state, scores)
    """
    rows, scale, namespace = checks.token("attend_scores", q, k, v, state, rows, scale)
    if namespace is None:
        return reference.attend_scores(q, k, v, rows, state, scale)
    kept = (state.keys, state.values, state.position, state.free, state.seen)
    return _run(namespace, "attend_scores", q, k, v, rows, *kept, scale)


def evict(state: MultiState, scores: Tensor, *, rows: Tensor | None = None) -> None:
    """The second half of :func:`attend_evict`: choose the state that goes, and mark it free.

    A row without a token that waits is left as it is.

    Args:
        state: changed in place.
        scores: (B, G, N+1) float32, from :func:`attend_scores`, perhaps summed over ranks.
        rows: as :func:`attend_scores` was given them.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.

    Source: Oren et al. 2024, Algorithm 1, its selection.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.tova(1), batch=1, kv_heads=1, head_dim=8)
    >>> for _ in range(2):
    ...     out, scores = ms.attend_scores(*torch.ones(3, 1, 1, 8), state)
    ...     ms.evict(state, scores)
    >>> state.last_evicted
    tensor([[0]])
    """
    rows, namespace = checks.scores(state, scores, rows)
    if namespace is None:
        return reference.evict(state, scores, rows)
    marks = (state.position, state.score, state.free, state.seen, state.last_evicted)
    _run(namespace, "evict", scores.contiguous(), rows, *marks, *state.policy.numbers)


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
) -> Tensor:
    """A prompt: causal attention over the kept states and all its tokens, then one reduction to N.

    Every query sees what was kept and the prompt up to itself. The states that stay are chosen
    once, by the attention of the prompt's last query (TOVA), of all its queries (H2O), or by
    position. The state may hold earlier turns; a token that waits for :func:`evict` is replaced.
    The output is computed by PyTorch's scaled_dot_product_attention, whose NaNs may reach rows that
    do not see them.

    Args:
        q: queries, (B, Hq, T, Dh), Hq a multiple of Hkv; in the dtype of the state.
        k: keys after rotary embedding, (B, Hkv, T, Dh).
        v: values, (B, Hkv, T, Dh).
        state: changed in place.
        valid: (B, T) bool, False where a row is padding (left padding or any other); positions
            count real tokens. None: all are real.
        rows: as in :func:`attend_evict`: each prompt continues a row of the state.
        cu_seqlens: (S + 1,) int32 or int64, not decreasing: prompts without padding, one behind the
            other, prompt s in ``q[cu_seqlens[s]:cu_seqlens[s + 1]]``. Then q is (total, Hq, Dh),
            k and v are (total, Hkv, Dh), rows (S,). Prompts on a GPU are cut by the CPU, which
            waits for cu_seqlens unless they are there.
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        (B, Hq, T, Dh) in the dtype of q, or (total, Hq, Dh); 0 at padding, and where no prompt is
        or its row does nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`attend_evict`.

    Source: Oren et al. 2024, section 3.3 and its official code; H2O: Zhang et al. 2023.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.window(4), batch=1, kv_heads=1, head_dim=8)
    >>> ms.attend_prompt(*torch.randn(3, 1, 1, 9, 8), state).shape, state.kept_positions()
    (torch.Size([1, 1, 9, 8]), tensor([[[5, 6, 7, 8]]]))

    Two prompts, of 3 and 4 tokens, for two rows of a state of five:

    >>> state = ms.MultiState(ms.Policy.tova(4), batch=5, kv_heads=1, head_dim=8)
    >>> rows, cu_seqlens = torch.tensor([3, 0]), torch.tensor([0, 3, 7])
    >>> q, k, v = torch.randn(3, 7, 1, 8)
    >>> out = ms.attend_prompt(q, k, v, state, rows=rows, cu_seqlens=cu_seqlens)
    >>> out.shape, state.seen
    (torch.Size([7, 1, 8]), tensor([4, 0, 0, 3, 0]))
    """
    rows, scale, namespace = checks.prompt(q, k, v, state, valid, rows, cu_seqlens, scale)
    if namespace is None:
        return reference.attend_prompt(q, k, v, state, valid, cu_seqlens, rows, scale)
    rest = (*state.tensors(), *state.policy.numbers, scale)
    return _run(namespace, "attend_prompt", q, k, v, valid, cu_seqlens, rows, *rest)


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Policy,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A whole sequence with the policy applied after every token, as :func:`attend_evict` does.

    It is causal attention in which key j is visible to the queries j <= t < expiry[j]. The expiry
    also makes the mask of FlexAttention:
    ``lambda b, h, t, j: (t >= j) & (t < expiry[b, 0, j])`` (for scope ``"head"`` index the
    key-value head, ``h // (Hq // Hkv)``).

    Args:
        q: queries, (B, Hq, T, Dh), Hq a multiple of Hkv; float32, bfloat16 or float16, as k and v.
            Under autocast they may differ, and the widest dtype is used.
        k: keys after rotary embedding, (B, Hkv, T, Dh).
        v: values, (B, Hkv, T, Dh).
        policy: what to keep.
        valid: (B, T) bool, False where a row is padding. None: all are real.
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        out, (B, Hq, T, Dh), 0 at padding; and expiry, (B, G, T) int64. ``expiry[b, g, j]`` is the
        first query that can no longer see key j, T if the key stays, and j itself at padding,
        which nothing sees.

    Differentiable in q, k and v for the given expiry, any number of times, in forward mode and in
    torch.func: which states are kept is a choice and has no gradient. Work is O(T N), memory O(T)
    besides the state; what is not a first derivative by ``backward`` holds T×T weights.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.

    Source: Oren et al. 2024, section 3.2, the masks of its perplexity experiments.

    >>> import torch, msrnn_ops as ms
    >>> out, expiry = ms.attend_sequence(*torch.randn(3, 1, 1, 5, 8), ms.Policy.window(2))
    >>> expiry
    tensor([[[3, 4, 5, 5, 5]]])
    """
    (q, k, v), valid, scale, namespace = checks.sequence(q, k, v, policy, valid, scale)
    if namespace is None:
        return reference.attend_sequence(q, k, v, policy, valid, scale)
    settings = (policy.slots, policy.scope == "head", *policy.numbers, scale)
    args: tuple[Any, ...] = (q, k, v, valid, *settings)
    if is_distributed(q):
        args = checks.placed("attend_sequence", args)
    return SEQUENCES[namespace](*args)
