"""What a bounded attention layer keeps, and by which policy: Policy and MultiState.

A decoder layer's key-value cache is the state of a multi-state RNN; bounded to N states it is a
finite one (Oren et al. 2024, "Transformers are Multi-State RNNs"). The state has N+1 slots, one of
them always free: a token is written there, all N+1 states are attended and scored, and the slot of
the one that goes is the next free one. Nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree

from msrnn_ops import _C, errors
from msrnn_ops.dtensor import is_distributed, replicated

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEAD_DIM = 256
_SCORES = ("position", "attention", "accumulated")  # as ScoreKind of csrc/eviction.h
_SCOPES = ("layer", "head")


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
    TOVA          attention    \u2013 (optional: the first tokens, the most recent ones)
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
        for name, least in (("slots", 1), ("sinks", 0), ("recent", 0)):
            errors.check_int("Policy", name, getattr(self, name), least)
        if self.sinks + self.recent > self.slots:
            raise errors.value(
                "Policy",
                "sinks + recent <= slots, so that a state is left to evict",
                f"{self.sinks} + {self.recent} > {self.slots}",
            )
        for name, words in (("score", _SCORES), ("scope", _SCOPES)):
            if getattr(self, name) not in words:
                among = ", ".join(map(repr, words))
                raise errors.value("Policy", f"{name} among {among}", repr(getattr(self, name)))

    @classmethod
    def tova(
        cls,
        slots: int,
        scope: str = "layer",
        sinks: int = 0,
        protect_last: bool = False,
        recent: int = 0,
    ) -> Policy:
        """The state with the least attention from the current query; possibly the newest.

        The paper protects nothing. ``protect_last`` is short for ``recent=1``; with ``recent`` half
        of the slots a pretrained model predicts text 1 to 2 % better (bench/README.md).
        """
        if not isinstance(protect_last, bool):
            raise errors.kind("Policy", "protect_last", "a bool", protect_last)
        errors.check_int("Policy", "recent", recent, 0)
        return cls(slots, "attention", sinks, max(recent, int(protect_last)), scope)

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
        errors.check_int("Policy", "slots", slots)
        return cls(slots, "accumulated", 0, slots // 2 if recent is None else recent, scope)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Kind of score, sinks and recent, as the operators take a policy."""
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

    TENSORS = ("keys", "values", "position", "score", "free", "seen", "last_evicted")

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
            raise errors.kind("MultiState", "policy", "a Policy", policy)
        errors.check_int("MultiState", "batch", batch, 0)
        errors.check_int("MultiState", "kv_heads", kv_heads, 1)
        errors.check_int("MultiState", "head_dim", head_dim, 1)
        check_head_dim("MultiState", head_dim)
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
            if type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling():
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
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of ``TENSORS`` and of the operators' arguments."""
        marks = (self.position, self.score, self.free, self.seen, self.last_evicted)
        return self.keys, self.values, *marks

    def kept_positions(self) -> Tensor:
        """Positions of the kept states, (B, G, N) int64, ascending, then -1."""
        empty = torch.iinfo(torch.int64).max
        position = self.position.scatter(-1, self.free[..., None], -1)  # a token may wait there
        kept = position.masked_fill(position < 0, empty).sort(-1).values
        return kept.masked_fill(kept == empty, -1)[..., : self.policy.slots]

    def reset(self, rows: Tensor | None = None) -> None:
        """Forgets everything, or what some rows hold; the tensors stay where they are.

        Args:
            rows: (B,) int32 or int64, each in [0, the rows of the state), or -1, which is none.
                None: all rows.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; a number out of range where it
                can be seen without waiting for a device (elsewhere it is no row).

        >>> import torch, msrnn_ops as ms
        >>> state = ms.MultiState(ms.Policy.window(2), batch=3, kv_heads=1, head_dim=8)
        >>> out = ms.attend_evict(*torch.randn(3, 3, 1, 8), state)
        >>> state.reset(torch.tensor([2, 0]))
        >>> state.seen
        tensor([0, 1, 0])
        """
        empty = (
            (self.position, -1), (self.score, 0), (self.free, 0), (self.seen, 0),
            (self.last_evicted, -1),
        )  # fmt: skip
        if rows is None:
            for x, value in empty:
                x.fill_(value)
            return
        if is_distributed(self.seen):
            raise errors.value("reset", "rows=None with DTensors", "rows")
        count = self.seen.shape[0]
        if errors.check_rows("reset", rows, None, count, self.device, "the state", once=False):
            index = rows[rows >= 0].to(torch.int64)
            for x, value in empty:
                x.index_fill_(0, index, value)
            return
        # Nothing waits for the device to learn how many there are: a last row takes the others.
        named = torch.where((rows >= 0) & (rows < count), rows.to(torch.int64), count)
        chosen = torch.zeros(count + 1, dtype=torch.bool, device=self.device)
        chosen = chosen.index_fill_(0, named, True)[:count]
        for x, value in empty:
            x.masked_fill_(chosen.view(-1, *[1] * (x.dim() - 1)), value)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row ``index[b]`` was, as in beam search: everything moves.

        Args:
            index: (B,) int32 or int64, each in [0, B).

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; an index out of range where it
                can be seen without waiting for a device. RuntimeError: under torch.func.
        """
        rows = self.seen.shape[0]
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"reorder: expected index to be an int32 or int64 tensor, got {got}")
        transformed = torch._C._are_functorch_transforms_active()
        if transformed and torch._C._functorch.is_functorch_wrapped_tensor(index):
            raise RuntimeError(
                "reorder: expected index to be a plain tensor, got one of a torch.func transform, "
                "which cannot change the state in place: call it outside the transform"
            )
        if index.shape != (rows,):
            raise errors.shape("reorder", "index", (rows,), index)
        if index.device != self.device:
            raise errors.value("reorder", f"index on {self.device}", index.device)
        if type(index) is Tensor and index.is_cpu and not torch.compiler.is_compiling():
            wrong = index[(index < 0) | (index >= rows)]
            if len(wrong):
                raise errors.value("reorder", f"indices in [0, {rows})", int(wrong[0]))
        if is_distributed(self.seen) and not is_distributed(index):
            index = replicated(index, cast(Any, self.seen).device_mesh)
        for x in self.tensors():
            x.copy_(x.index_select(0, index))

    def to(self, *args: Any, **kwargs: Any) -> MultiState:
        """A copy on another device or with keys and values in another dtype, as ``Tensor.to``."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        _check_kept_dtype(like.dtype)
        tensors = []
        for name in self.TENSORS:
            x = getattr(self, name)
            dtype = like.dtype if name in ("keys", "values") else x.dtype
            tensors.append(x.to(device=like.device, dtype=dtype, copy=True))
        return restore(tensors, self.policy)

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


def _check_kept_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        expected = "torch.float32, bfloat16, float16 or float64"
        raise TypeError(f"MultiState: expected dtype to be {expected}, got {dtype!r}")


def restore(tensors: Iterable[Tensor], policy: Policy) -> MultiState:
    """A state of these tensors, in the order of ``MultiState.TENSORS``."""
    state = MultiState.__new__(MultiState)
    state.policy = policy
    for name, x in zip(MultiState.TENSORS, tensors, strict=True):
        setattr(state, name, x)
    return state


_pytree.register_pytree_node(
    MultiState,
    lambda state: (list(state.tensors()), state.policy),
    restore,
    serialized_type_name="msrnn_ops.MultiState",
    flatten_with_keys_fn=lambda state: (
        [(_pytree.GetAttrKey(name), getattr(state, name)) for name in state.TENSORS],
        state.policy,
    ),
    to_dumpable_context=lambda policy: policy.__dict__,
    from_dumpable_context=lambda fields: Policy(**fields),
)


# torch.load(weights_only=True) reads states of this version and of 0.1.0, which were made in
# msrnn_ops.multi_state.
_FORMER_NAMES = [(x, f"msrnn_ops.multi_state.{x.__name__}") for x in (MultiState, Policy)]
torch.serialization.add_safe_globals([MultiState, Policy, *_FORMER_NAMES])


def check_head_dim(caller: str, head_dim: int, argument: str = "a head_dim") -> None:
    if head_dim < 8 or head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        expected = f"{argument} that is a multiple of 8, up to {LARGEST_HEAD_DIM}"
        raise errors.value(caller, expected, head_dim)
