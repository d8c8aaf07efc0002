"""Multi-state attention: policy, state, and the ops that attend and evict.

A decoder layer's key-value cache is the state of a multi-state RNN; bounded to N states it is a
finite one (Oren et al. 2024, "Transformers are Multi-State RNNs"). The state has N+1 slots, one of
them always free: a token is written there, all N+1 states are attended and scored, and the slot of
the one that goes is the next free one. Nothing is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree

from msrnn_ops import _C, backend, multi_state_device, reference
from msrnn_ops.scan import _is_distributed, _libraries

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCORES = ("position", "attention", "accumulated")  # as ScoreKind of csrc/eviction.h
_SCOPES = ("layer", "head")
_LARGEST_HEAD_DIM = 256
_QUERIES_AT_ONCE = 256  # rows of a mask, where a prompt meets a state that is not empty


@dataclass(frozen=True)
class Policy:
    """Which state goes when a token more than ``slots`` is there.

    The unprotected state with the lowest score goes; of equals the oldest; NaN counts as lowest.

    ============  ===========  ================================================
    policy        score        protected
    ============  ===========  ================================================
    Window        position     \u2013
    Window+i      position     the first i tokens
    H2O           accumulated  the most recent tokens, half of the slots
    TOVA          attention    \u2013 (optional: the first i tokens, the current one)
    ============  ===========  ================================================

    Use :meth:`tova`, :meth:`window`, :meth:`window_sinks` and :meth:`h2o`, or any other point:

    Args:
        slots: states kept, N >= 1.
        score: ``"position"``, ``"attention"`` (of the current query) or ``"accumulated"``
            (attention since the state was stored).
        sinks: the first so many tokens of a row are never evicted.
        recent: nor are the most recent so many, the current one included.
        scope: ``"layer"``: one decision a row, from the attention of all heads; ``"head"``: one for
            each key-value head, from its query heads.

    Raises:
        ValueError: a number out of range, an unknown word, or protected states that leave nothing
            to evict (sinks + recent > slots). TypeError: not an integer.

    Source: Oren et al. 2024, sections 3.2 and 3.3; H2O: Zhang et al. 2023, Algorithm 1.

    >>> import msrnn_ops as ms
    >>> ms.Policy.h2o(512)
    Policy(slots=512, score='accumulated', sinks=0, recent=256, scope='layer')
    """

    slots: int
    score: str
    sinks: int = 0
    recent: int = 0
    scope: str = "layer"

    def __post_init__(self) -> None:
        for name in ("slots", "sinks", "recent"):
            _check_int("Policy", name, getattr(self, name))
        if self.slots < 1:
            raise ValueError(f"Policy: expected slots >= 1, got {self.slots}")
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"Policy: expected {name} >= 0, got {getattr(self, name)}")
        if self.sinks + self.recent > self.slots:
            raise ValueError(
                "Policy: expected sinks + recent <= slots, so that a state is left to evict, got "
                f"{self.sinks} + {self.recent} > {self.slots}"
            )
        if self.score not in _SCORES:
            raise ValueError(
                f"Policy: expected score among {', '.join(map(repr, _SCORES))}, got {self.score!r}"
            )
        if self.scope not in _SCOPES:
            raise ValueError(f"Policy: expected scope 'layer' or 'head', got {self.scope!r}")

    @classmethod
    def tova(
        cls, slots: int, scope: str = "layer", sinks: int = 0, protect_last: bool = False
    ) -> Policy:
        """The state with the least attention from the current query; possibly the newest."""
        return cls(slots, "attention", sinks, 1 if protect_last else 0, scope)

    @classmethod
    def window(cls, slots: int) -> Policy:
        """The oldest state."""
        return cls(slots, "position")

    @classmethod
    def window_sinks(cls, slots: int, sinks: int) -> Policy:
        """The oldest state but for the first ``sinks`` tokens."""
        return cls(slots, "position", sinks)

    @classmethod
    def h2o(cls, slots: int, recent: int | None = None, scope: str = "layer") -> Policy:
        """The state with the least attention in all its time, but for the most recent ones."""
        _check_int("Policy", "slots", slots)
        return cls(slots, "accumulated", 0, slots // 2 if recent is None else recent, scope)

    @property
    def _numbers(self) -> tuple[int, int, int]:
        return _SCORES.index(self.score), self.sinks, self.recent


class MultiState:
    """The kept states of one attention layer, for a batch of independent rows.

    Args:
        policy: what to keep.
        batch: rows, B.
        kv_heads: key-value heads, Hkv.
        head_dim: Dh, a multiple of 8 up to 256.
        dtype: of keys and values: float32, bfloat16 or float16 (float64: reference backend only).
        device: where it lives; by default, where torch makes tensors.

    Attributes:
        keys, values: (B, Hkv, N+1, Dh). Free slots hold anything.
        position: (B, G, N+1) int64, the token's number in its row, from 0; -1: empty. G is 1 for
            scope ``"layer"``, Hkv for ``"head"``.
        score: (B, G, N+1) float32, the accumulated attention, summed over query heads; (B, G, 0)
            where the policy does not accumulate.
        free: (B, G) int64, the slot that the next token is written to.
        seen: (B,) int64, tokens so far.
        last_evicted: (B, G) int64, the position that the last call dropped (of several the one
            with the highest score); -1: none.

    The ops change these tensors in place and never replace them, which is what CUDA graphs need.
    They are for reading: a position, ``free`` or ``seen`` changed by hand breaks the row.

    Raises:
        TypeError, ValueError: a wrong policy, number or dtype.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.window(2), batch=1, kv_heads=1, head_dim=8)
    >>> for _ in range(3):
    ...     out = ms.attend_evict(*torch.randn(3, 1, 1, 8), state)
    >>> state
    MultiState(Policy(slots=2, score='position', ...), kept [2] of 2, seen [3], kv_heads=1, ...)
    >>> state.kept_positions(), state.last_evicted
    (tensor([[[1, 2]]]), tensor([[0]]))
    """

    _TENSORS = ("keys", "values", "position", "score", "free", "seen", "last_evicted")

    def __init__(
        self,
        policy: Policy,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"MultiState: expected a Policy, got {type(policy).__name__}")
        sizes = (("batch", batch, 0), ("kv_heads", kv_heads, 1), ("head_dim", head_dim, 1))
        for name, value, least in sizes:
            _check_int("MultiState", name, value)
            if value < least:
                raise ValueError(f"MultiState: expected {name} >= {least}, got {value}")
        _check_head_dim("MultiState", head_dim)
        _check_kept_dtype(dtype)
        groups = 1 if policy.scope == "layer" else kv_heads
        slots = policy.slots + 1
        scored = slots if policy.score == "accumulated" else 0

        def whole(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int64, device=device)

        self.policy = policy
        self.keys = torch.empty(batch, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        for x in (self.keys, self.values):
            if type(x) is Tensor and x.device.type == "cpu" and not _compiling():
                _C.prefer_huge_pages(x.data_ptr(), x.numel() * x.element_size())
        self.position = whole(batch, groups, slots)
        self.score = torch.zeros(batch, groups, scored, dtype=torch.float32, device=device)
        self.free = whole(batch, groups).zero_()
        self.seen = whole(batch).zero_()
        self.last_evicted = whole(batch, groups)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors, in bytes."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in self._TENSORS)

    def kept_positions(self) -> Tensor:
        """Positions of the kept states, (B, G, N) int64, ascending, then -1."""
        empty = torch.iinfo(torch.int64).max
        position = self.position.scatter(-1, self.free[..., None], -1)  # a token may wait there
        kept = position.masked_fill(position < 0, empty).sort(-1).values
        return kept.masked_fill(kept == empty, -1)[..., : self.policy.slots]

    def reset(self) -> None:
        """Forgets everything; the tensors stay where they are."""
        self.position.fill_(-1)
        self.score.zero_()
        self.free.zero_()
        self.seen.zero_()
        self.last_evicted.fill_(-1)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was, as in beam search: everything moves.

        Args:
            index: (B,) int32 or int64, each in [0, B).

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; an index out of range where it
                can be seen without waiting for a device.
        """
        rows = self.seen.shape[0]
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"reorder: expected an int32 or int64 tensor, got {got}")
        if index.shape != (rows,):
            raise ValueError(
                f"reorder: expected index of shape ({rows},), got {tuple(index.shape)}"
            )
        if index.device != self.device:
            raise ValueError(f"reorder: expected index on {self.device}, got {index.device}")
        if type(index) is Tensor and index.device.type == "cpu" and not _compiling():
            wrong = index[(index < 0) | (index >= rows)]
            if len(wrong):
                raise ValueError(f"reorder: expected indices in [0, {rows}), got {int(wrong[0])}")
        if _is_distributed(self.seen) and not _is_distributed(index):
            from msrnn_ops.distributed import sharding

            index = sharding.replicated(index, cast(Any, self.seen).device_mesh)
        for x in self._tensors():
            x.copy_(x.index_select(0, index))

    def to(self, *args: Any, **kwargs: Any) -> MultiState:
        """A copy on another device or with keys and values in another dtype, as ``Tensor.to``."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        _check_kept_dtype(like.dtype)
        tensors = []
        for name in self._TENSORS:
            x = getattr(self, name)
            dtype = like.dtype if name in ("keys", "values") else x.dtype
            tensors.append(x.to(device=like.device, dtype=dtype, copy=True))
        return _restore(tensors, self.policy)

    def __repr__(self) -> str:
        batch, heads, slots, head_dim = self.keys.shape
        if self.device.type == "meta" or type(self.seen) is not Tensor:
            fill = f"batch={batch}"
        else:
            kept = (self.position >= 0).sum(-1).amax(-1).tolist() if self.position.numel() else []
            fill = f"kept {kept} of {slots - 1}, seen {self.seen.tolist()}"
        return (
            f"MultiState({self.policy}, {fill}, kv_heads={heads}, head_dim={head_dim}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def _check_int(name: str, label: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected {label} to be an int, got {value!r}")


def _check_kept_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"MultiState: expected float32, bfloat16, float16 or float64, got {dtype}")


def _restore(tensors: Any, policy: Policy) -> MultiState:
    state = MultiState.__new__(MultiState)
    state.policy = policy
    for name, x in zip(MultiState._TENSORS, tensors, strict=True):
        setattr(state, name, x)
    return state


_pytree.register_pytree_node(
    MultiState,
    lambda state: (list(state._tensors()), state.policy),
    _restore,
    serialized_type_name="msrnn_ops.MultiState",
    flatten_with_keys_fn=lambda state: (
        [(_pytree.GetAttrKey(name), getattr(state, name)) for name in state._TENSORS],
        state.policy,
    ),
    to_dumpable_context=lambda policy: policy.__dict__,
    from_dumpable_context=lambda fields: Policy(**fields),
)


torch.serialization.add_safe_globals([MultiState, Policy])


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _check_head_dim(name: str, head_dim: int) -> None:
    if head_dim < 8 or head_dim % 8 or head_dim > _LARGEST_HEAD_DIM:
        raise ValueError(
            f"{name}: expected a head_dim that is a multiple of 8, up to {_LARGEST_HEAD_DIM}, "
            f"got {head_dim}"
        )


def _check_tokens(name: str, q: Tensor, k: Tensor, v: Tensor, time: bool) -> None:
    """q (B, Hq, [T,] Dh), k and v (B, Hkv, [T,] Dh) of one dtype on one device."""
    layout = "H, T, Dh" if time else "H, Dh"
    for label, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected {label} to be a tensor, got {type(x).__name__}")
        if x.dim() != (4 if time else 3):
            raise ValueError(
                f"{name}: expected {label} of shape (B, {layout}), got {tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected {label} in float32, bfloat16 or float16, got {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {label} in the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(
                f"{name}: expected {label} on the device of q, {q.device}, got {x.device}"
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{name}: expected v in the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"{name}: expected k like q but for its heads, {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}: expected as many query heads as key-value heads or a multiple, got "
            f"{q.shape[1]} and {k.shape[1]}"
        )
    _check_head_dim(name, q.shape[-1])


def _check_state(name: str, state: MultiState, k: Tensor | None) -> None:
    if not isinstance(state, MultiState):
        raise TypeError(f"{name}: expected a MultiState, got {type(state).__name__}")
    for label, x in zip(state._TENSORS, state._tensors(), strict=True):
        if not x.is_contiguous():
            raise ValueError(
                f"{name}: expected state.{label} to be contiguous, got strides {x.stride()}"
            )
        if x.device != state.device:
            raise ValueError(
                f"{name}: expected state.{label} on the device of its keys, {state.device}, "
                f"got {x.device}"
            )
    if k is None:
        return
    batch, heads, _, head_dim = state.keys.shape
    for label, got, kept in (
        ("a batch", k.shape[0], batch),
        ("key-value heads", k.shape[1], heads),
        ("a head_dim", k.shape[-1], head_dim),
    ):
        if got != kept:
            raise ValueError(f"{name}: expected {label} of {kept} as in the state, got {got}")
    if k.dtype != state.dtype:
        raise TypeError(
            f"{name}: expected q, k and v in the dtype of the state, {state.dtype}, got {k.dtype}"
        )
    if k.device != state.device:
        raise ValueError(
            f"{name}: expected q, k and v on the device of the state, {state.device}, "
            f"got {k.device}"
        )


def _check_valid(name: str, valid: Tensor, q: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"{name}: expected valid to be a bool tensor, got {got}")
    if valid.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"{name}: expected valid of shape (B, T) = {(q.shape[0], q.shape[2])}, "
            f"got {tuple(valid.shape)}"
        )
    if valid.device != q.device:
        raise ValueError(
            f"{name}: expected valid on the device of q, {q.device}, got {valid.device}"
        )


def _checked_prompt(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, valid: Tensor | None, scale: float | None
) -> float:
    """The scale of a prompt's logits."""
    _check_tokens("attend_prompt", q, k, v, time=True)
    _check_state("attend_prompt", state, k)
    if valid is not None:
        _check_valid("attend_prompt", valid, q)
    return _scale_of("attend_prompt", scale, q.shape[-1])


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _refuse_gradient(name: str, tensors: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} changes the state in place and has no gradient: call it under torch.no_grad() "
            "or detach its inputs; msrnn_ops.attend_sequence is the differentiable form"
        )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise RuntimeError(f"{name} changes the state in place and has no forward-mode gradient")


def _in_place_autograd(namespace: str, name: str) -> Callable[..., Any]:
    op = getattr(getattr(torch.ops, namespace), name).default
    written = [i for i, x in enumerate(op._schema.arguments) if x.alias_info is not None]

    def run(*args: Any) -> Any:
        _refuse_gradient(name, tuple(x for x in args if isinstance(x, Tensor)))
        # So that a backward pass that has saved one of them says so.
        changed = [args[i] for i in written if not args[i].is_inference()]
        torch.autograd.graph.increment_version(changed)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _libraries[namespace].impl(name, run, "Autograd")
    return run


_in_place = {
    (namespace, name): _in_place_autograd(namespace, name)
    for namespace in _libraries
    for name in ("attend_evict", "attend_scores", "evict", "attend_prompt", "store_prompt")
}


def _run(namespace: str, name: str, *args: Any) -> Any:
    """Calls an op that changes a state; in eager mode without a way through the dispatcher."""
    args = _distributed(name, args)
    if _compiling() or torch._C._are_functorch_transforms_active():
        return getattr(getattr(torch.ops, namespace), name)(*args)
    return _in_place[namespace, name](*args)


def _distributed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op, checked where they are DTensors."""
    if not _is_distributed(args[0]):
        return args
    from msrnn_ops.distributed import sharding

    return sharding.arguments(name, args)


def _scale_of(name: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{name}: expected scale to be a number, got {scale!r}")
    return float(scale)


def _namespace(name: str, x: Tensor) -> str | None:
    """Of the operator that computes this call; None: the reference does."""
    namespace = backend.namespace(name, x.device)
    if namespace is None and _is_distributed(x):
        raise ValueError(f"{name}: expected plain tensors for the reference backend, got a DTensor")
    if namespace is not None and x.dtype == torch.float64:
        raise TypeError(
            f"{name}: expected float32, bfloat16 or float16, got {x.dtype}; "
            "msrnn_ops.use_backend('reference') computes in float64"
        )
    return namespace


def attend_evict(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, *, scale: float | None = None
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
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        (B, Hq, Dh) in the dtype of q, contiguous.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device, before anything is written.
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
    """
    _check_tokens("attend_evict", q, k, v, time=False)
    _check_state("attend_evict", state, k)
    factor = _scale_of("attend_evict", scale, q.shape[-1])
    namespace = _namespace("attend_evict", q)
    if namespace is None:
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend_evict(q, k, v, state, factor)
    adds_up = state.policy.scope == "layer" and state.policy.score != "position"
    if adds_up and _is_distributed(q):
        out, scores = attend_scores(q, k, v, state, scale=scale)  # of heads on other ranks, too
        evict(state, scores)
        return out
    return _run(
        namespace, "attend_evict", q, k, v, *state._tensors(), *state.policy._numbers, factor
    )


def attend_scores(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The first half of :func:`attend_evict`: store and attend, and decide nothing yet.

    Where heads are sharded over ranks, the scores are summed over the ranks before :func:`evict`.
    ``attend_scores`` and ``evict`` together equal ``attend_evict`` bit by bit. Called again before
    ``evict``, it replaces the token that waits.

    Args:
        q, k, v, state, scale: as in :func:`attend_evict`.

    Returns:
        The output, (B, Hq, Dh), and the scores, (B, G, N+1) float32: the attention to each slot,
        summed over the query heads (0 for empty slots).

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
    _check_tokens("attend_scores", q, k, v, time=False)
    _check_state("attend_scores", state, k)
    factor = _scale_of("attend_scores", scale, q.shape[-1])
    namespace = _namespace("attend_scores", q)
    if namespace is None:
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend_scores(q, k, v, state, factor)
    kept = (state.keys, state.values, state.position, state.free, state.seen)
    return _run(namespace, "attend_scores", q, k, v, *kept, factor)


def evict(state: MultiState, scores: Tensor) -> None:
    """The second half of :func:`attend_evict`: choose the state that goes, and mark it free.

    A row without a token that waits is left as it is.

    Args:
        state: changed in place.
        scores: (B, G, N+1) float32, from :func:`attend_scores`, perhaps summed over ranks.

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
    _check_state("evict", state, None)
    wanted = torch.float64 if state.dtype == torch.float64 else torch.float32
    if not isinstance(scores, Tensor) or scores.dtype != wanted:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"evict: expected scores to be a {wanted} tensor, got {got}")
    if scores.shape != state.position.shape:
        raise ValueError(
            f"evict: expected scores of shape {tuple(state.position.shape)}, "
            f"got {tuple(scores.shape)}"
        )
    if scores.device != state.device:
        raise ValueError(f"evict: expected scores on {state.device}, got {scores.device}")
    namespace = _namespace("evict", scores)
    if namespace is None:
        return reference.evict(state, scores)
    marks = (state.position, state.score, state.free, state.seen, state.last_evicted)
    _run(namespace, "evict", scores.contiguous(), *marks, *state.policy._numbers)


def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    *,
    valid: Tensor | None = None,
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
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        (B, Hq, T, Dh) in the dtype of q; 0 at padding.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`attend_evict`.

    Source: Oren et al. 2024, section 3.3 and its official code; H2O: Zhang et al. 2023.

    >>> import torch, msrnn_ops as ms
    >>> state = ms.MultiState(ms.Policy.window(4), batch=1, kv_heads=1, head_dim=8)
    >>> ms.attend_prompt(*torch.randn(3, 1, 1, 9, 8), state).shape, state.kept_positions()
    (torch.Size([1, 1, 9, 8]), tensor([[[5, 6, 7, 8]]]))
    """
    factor = _checked_prompt(q, k, v, state, valid, scale)
    namespace = _namespace("attend_prompt", q)
    if namespace is None:
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend_prompt(q, k, v, state, valid, factor)
    numbers = (*state.policy._numbers, factor)
    return _run(namespace, "attend_prompt", q, k, v, valid, *state._tensors(), *numbers)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries (B, H, T, Dh) onto all keys (B, H, before + T, Dh)."""
    queries, columns = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if queries == columns:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    before = columns - queries
    parts = []
    for start in range(0, queries, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, queries)
        seen = torch.ones(end - start, before + end, dtype=torch.bool, device=q.device)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, : before + end],
                v[:, :, : before + end],
                attn_mask=seen.tril(before + start),
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, 2)


def _prompt_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    if q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    kept = (position >= 0).sum(-1).tolist()  # (B, G), the same for all groups of a row
    if valid is None and not any(map(any, kept)):
        return _causal(q, k, v, scale).contiguous()
    out = q.new_zeros(q.shape)
    for b in range(q.shape[0]):
        token = slice(None) if valid is None else valid[b].nonzero()[:, 0]
        # Slots of the kept states, in the order of their positions, for every key-value head.
        order = position[b].argsort(-1, descending=True)[:, : kept[b][0]].flip(-1)
        slots = order[..., None].expand(k.shape[1], -1, k.shape[3])
        row_k = torch.cat([keys[b].gather(1, slots), k[b][:, token]], 1)
        row_v = torch.cat([values[b].gather(1, slots), v[b][:, token]], 1)
        row_q = q[b][:, token]
        if row_q.shape[1]:
            out[b, :, token] = _causal(row_q[None], row_k[None], row_v[None], scale)[0]
    return out


def _without_waiting(position: Tensor, free: Tensor) -> Tensor:
    """Positions as a prompt finds them: a token that waits is replaced."""
    return position.scatter(-1, free.clamp(0, position.shape[2] - 1)[..., None], -1)


def _attend_prompt(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any) -> Tensor:
    keys, values, position, _, free, *_ = rest
    position = _without_waiting(position, free)
    with torch.autocast(q.device.type, enabled=False):
        out = _prompt_output(q, k, v, valid, keys, values, position, rest[-1])
    valid = None if valid is None else valid.contiguous()
    torch.ops.msrnn_ops.store_prompt(q, k, v, valid, *rest)
    return out


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
        q: queries, (B, Hq, T, Dh), Hq a multiple of Hkv; float32, bfloat16 or float16.
        k: keys after rotary embedding, (B, Hkv, T, Dh).
        v: values, (B, Hkv, T, Dh).
        policy: what to keep.
        valid: (B, T) bool, False where a row is padding. None: all are real.
        scale: of the logits. None: 1 / sqrt(Dh).

    Returns:
        out, (B, Hq, T, Dh), 0 at padding; and expiry, (B, G, T) int64: the first query that no
        longer sees key j, T if it stays; j itself at padding, which nothing sees.

    Differentiable in q, k and v for the given expiry: which states are kept is a choice and has no
    gradient. Work is O(T N), memory O(T) besides the state.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.

    Source: Oren et al. 2024, section 3.2, the masks of its perplexity experiments.

    >>> import torch, msrnn_ops as ms
    >>> out, expiry = ms.attend_sequence(*torch.randn(3, 1, 1, 5, 8), ms.Policy.window(2))
    >>> expiry
    tensor([[[3, 4, 5, 5, 5]]])
    """
    _check_tokens("attend_sequence", q, k, v, time=True)
    if not isinstance(policy, Policy):
        raise TypeError(f"attend_sequence: expected a Policy, got {type(policy).__name__}")
    if valid is not None:
        _check_valid("attend_sequence", valid, q)
        valid = valid.contiguous()
    factor = _scale_of("attend_sequence", scale, q.shape[-1])
    namespace = _namespace("attend_sequence", q)
    if namespace is None:
        with torch.autocast(q.device.type, enabled=False):
            return reference.attend_sequence(q, k, v, policy, valid, factor)
    numbers = (policy.slots, policy.scope == "head", *policy._numbers, factor)
    arguments = _distributed("attend_sequence", (q, k, v, valid, *numbers))
    if not _compiling() and torch._C._are_functorch_transforms_active():
        return _sequences[namespace].apply(*arguments)
    return getattr(torch.ops, namespace).attend_sequence(*arguments)


def _define_sequence(namespace: str) -> Any:
    """Registers the autograd of attend_sequence; returns its function."""
    forward_op = getattr(torch.ops, namespace).attend_sequence.default
    backward_op = getattr(torch.ops, namespace).attend_sequence_backward.default

    class AttendSequence(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            q, k, v, valid, *_, scale = inputs
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(q, k, v, output[1], valid)
            ctx.scale = scale

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> Any:
            q, k, v, expiry, valid = ctx.saved_tensors
            grads = backward_op(grad_out, q, k, v, expiry, valid, ctx.scale)
            return *grads, *(None,) * 7

    function = cast(Any, AttendSequence)  # its methods are untyped

    def autograd_kernel(*args: Any) -> tuple[Tensor, Tensor]:
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if needed or forward_ad._current_level >= 0:  # forward mode: a clear error, no silent 0
            return function.apply(*args)
        return AttendSequence.forward(*args)

    _libraries[namespace].impl("attend_sequence", autograd_kernel, "Autograd")
    return function


_sequences = {namespace: _define_sequence(namespace) for namespace in _libraries}


def _sequence_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, slots: int, per_head: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    groups = k.shape[1] if per_head else 1
    return q.new_empty(q.shape), q.new_empty((q.shape[0], groups, q.shape[2]), dtype=torch.int64)


_fake: dict[str, Callable[..., Any]] = {
    "attend_evict": lambda q, *_: q.new_empty(q.shape),
    "attend_scores": lambda q, k, v, keys, values, position, *_: (
        q.new_empty(q.shape),
        position.new_empty(position.shape, dtype=torch.float32),
    ),
    "evict": lambda *_: None,
    "attend_prompt": lambda q, *_: q.new_empty(q.shape),
    "store_prompt": lambda *_: None,
    "attend_sequence": _sequence_fake,
    "attend_sequence_backward": lambda grad, q, k, v, *_: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    ),
}
for _space in _libraries:
    for _name, _function in _fake.items():
        torch.library.register_fake(f"{_space}::{_name}", _function)
_libraries[backend.COMPILED].impl("attend_prompt", _attend_prompt, "CPU")


def _attend_prompt_on_device(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *rest: Any
) -> Tensor:
    keys, values, position, _, free, *_ = rest
    position = _without_waiting(position, free)
    out = multi_state_device.prompt_output(q, k, v, valid, keys, values, position, rest[-1])
    multi_state_device.store_prompt(q, k, v, valid, *rest)
    return out


def _as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel is by itself: without autocast, and at home with inference tensors."""

    def run(q: Tensor, *args: Any) -> Any:
        no_autocast = torch.autocast(q.device.type, enabled=False)
        with no_autocast, torch._C._AutoDispatchBelowADInplaceOrView():
            return function(q, *args)

    return run


_on_device: dict[str, Callable[..., Any]] = {
    "attend_prompt": _as_kernel(_attend_prompt_on_device),
    "store_prompt": _as_kernel(multi_state_device.store_prompt),
    "attend_sequence_backward": _as_kernel(multi_state_device.attend_sequence_backward),
}
for _name, _by_torch in _on_device.items():
    _libraries[backend.COMPILED].impl(_name, _by_torch, "CUDA")
    if backend.TRITON in _libraries:
        _libraries[backend.TRITON].impl(_name, _by_torch, "CompositeExplicitAutograd")
backend.implement_by_triton(
    _libraries, "multi_state", ["attend_evict", "attend_scores", "evict", "attend_sequence"]
)
