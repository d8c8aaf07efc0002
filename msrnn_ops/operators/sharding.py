"""DTensors: how the tensors of each op may lie on a mesh of devices.

In each dimension of the mesh the tensors of a call are whole, Replicate(), or sharded

- over rows: Shard(0) of everything that has a batch;
- over channels, in a scan: Shard(2) of (B, T, D) and Shard(1) of (B, D); not where several inputs
  lie side by side in one;
- over heads, in multi-state attention: Shard(1) of queries, keys and values, and of what each head
  decides for itself. What a layer decides is whole.

Then every rank runs the op on what it has, and nothing is sent. It computes the bits that one
device would, where the kernels' plan is the same for fewer rows, channels or heads (on a CPU
everywhere but in long sequences of few channels). Other inputs of a scan DTensor redistributes, but
time is never sharded: that would be another op. Multi-state attention, which changes its state
where it is, takes no others.

The public functions import this module when they meet a DTensor. Who calls ``torch.ops.msrnn_ops``
with DTensors imports it first: ``import msrnn_ops.operators.sharding``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import register_sharding

from msrnn_ops import backend, errors
from msrnn_ops.dtensor import replicated
from msrnn_ops.exchange import Exchange
from msrnn_ops.operators.multi_state import FAKES
from msrnn_ops.operators.scan import RECURRENCES
from msrnn_ops.state import MultiState, restore

_SCANS = {name: op for op in RECURRENCES for name in (op.name, f"{op.name}_backward")}
_KINDS: dict[Placement, str] = {Replicate(): "whole", Shard(0): "rows", Shard(1): "heads"}
_DECISIONS = ("position", "score", "scores", "free", "last_evicted", "expiry")
_OF_ROWS = ("seen", "valid")  # without heads
_SAME_EVERYWHERE = ("cu_seqlens", "resets", "valid")  # if they are plain tensors
_Rules: TypeAlias = list[tuple[list[Placement | None], list[Placement | None]]]


def _operator(namespace: str, name: str) -> OpOverload:
    return getattr(getattr(torch.ops, namespace), name).default


_LABELS = {
    name: tuple(x.name for x in _operator(backend.COMPILED, name)._schema.arguments)
    for name in (*_SCANS, *FAKES)
}


def _placed(named: dict[str, Any]) -> dict[str, Any]:
    """The DTensors, or what stands for them where a rule is asked."""
    numbers = (int, float)
    return {
        label: x
        for label, x in named.items()
        if not isinstance(x, numbers) and hasattr(x, "placements")
    }


def _check_scan(name: str, named: dict[str, Any]) -> None:
    op = _SCANS[name]
    for label, x in _placed(named).items():
        # The gradient of a whole result may come in any shards: it is redistributed.
        if x.ndim != 3 or label.startswith("grad"):
            continue
        for placement in x.placements:
            dim = getattr(placement, "dim", None)
            if dim == 1:
                raise ValueError(
                    f"{name}: expected {label} (B, T, D) whole in time, got {placement!r}; "
                    f"msrnn_ops.distributed.{op.name} scans a time axis that is sharded over ranks "
                    f"(give it {label}.to_local())"
                )
            if dim == 2 and label == "projection":
                plain = op.name.removesuffix("_joint")
                raise ValueError(
                    f"{name}: expected projection, {op.parts} inputs side by side, with whole "
                    f"channels, got {placement!r}; msrnn_ops.{plain} takes sharded channels, of "
                    "one linear layer for each input"
                )


def _scan_rules(name: str, op: OpOverload) -> Callable[..., _Rules]:
    returned = (3,) * (len(op._schema.returns) - 1) + (2,)

    def rules(*args: Any) -> _Rules:
        named = dict(zip(_LABELS[name], args, strict=True))
        _check_scan(name, named)
        # By the dimensions of a tensor: (N + 1), (B, D), (B, T, D).
        kinds: list[dict[int, Placement]] = [dict.fromkeys((1, 2, 3), Replicate())]
        if named["cu_seqlens"] is None:
            kinds.append({2: Shard(0), 3: Shard(0)})
        if _SCANS[name].parts == 1:
            kinds.append({1: Replicate(), 2: Shard(1), 3: Shard(2)})
        placed = _placed(named)

        def placement(label: str, x: Any, kind: dict[int, Placement]) -> Placement | None:
            if label == "resets" and x is not None:  # (B, T)
                return kind[2] if kind[2] == Shard(0) else Replicate()
            return None if x is None else kind[x.ndim]

        return [
            (
                [kind[n] for n in returned],
                [placement(label, placed.get(label), kind) for label in named],
            )
            for kind in kinds
        ]

    return rules


def _placement(label: str, kind: str, per_head: bool) -> Placement:
    """Of a tensor of multi-state attention, in a dimension of the mesh."""
    if kind == "rows":
        return Shard(0)
    without_heads = label in _OF_ROWS or (label in _DECISIONS and not per_head)
    return Replicate() if kind == "whole" or without_heads else Shard(1)


def _per_head(named: dict[str, Any]) -> bool:
    """Whether each key-value head decides for itself, or the layer for all of them."""
    decisions = named.get("position", named.get("expiry"))
    if decisions is None:
        return bool(named["per_head"])
    return "k" not in named or decisions.shape[1] == named["k"].shape[1]


def _ranks(kinds: Sequence[str], mesh: DeviceMesh, kind: str) -> int:
    """How many ranks share the rows, or the heads."""
    return math.prod(n for n, found in zip(mesh.shape, kinds, strict=True) if found == kind)


def _check_kinds(
    name: str, label: str, placements: Sequence[Placement], mesh: DeviceMesh, rows: int, heads: int
) -> list[str]:
    """The kind of each dimension of the mesh: whole, rows or heads."""
    if len(placements) != mesh.ndim:
        raise ValueError(
            f"{name}: expected {mesh.ndim} placements, as the mesh has dimensions, got {placements}"
        )
    for placement in placements:
        if placement not in _KINDS:
            raise ValueError(
                f"{name}: expected {label} sharded over rows, Shard(0), over heads, Shard(1), or "
                f"whole, Replicate(), got {placement!r}"
            )
    kinds = [_KINDS[placement] for placement in placements]
    if rows < (ranks := _ranks(kinds, mesh, "rows")):
        raise ValueError(f"{name}: expected a row or more for each of {ranks} ranks, got {rows}")
    if heads % (ranks := _ranks(kinds, mesh, "heads")):
        raise ValueError(
            f"{name}: expected as many key-value heads for each of {ranks} ranks, got {heads}"
        )
    return kinds


def _expected(name: str, named: dict[str, Any]) -> dict[str, tuple[Placement, ...]]:
    """The placements of all tensors, which follow those of one."""
    like = next(label for label in ("keys", "k", "position") if label in named)
    x, per_head = named[like], _per_head(named)
    kinds = _check_kinds(name, like, x.placements, x.device_mesh, *x.shape[:2])
    splits = _ranks(kinds, x.device_mesh, "heads") > 1
    if splits and not per_head and named.get("kind", 0):
        raise ValueError(
            f"{name}: expected whole heads, got {like} sharded over them: this policy adds up the "
            "scores of all heads of a layer, as msrnn_ops.attend_evict does for DTensors, and "
            "msrnn_ops.distributed.attend_evict and attend_prompt for plain tensors; "
            "scope='head' needs no sum"
        )
    return {
        label: tuple(_placement(label, kind, per_head) for kind in kinds)
        for label in _placed(named)
    }


def _check_multi_state(name: str, named: dict[str, Any]) -> bool:
    """Whether the gradients lie as they should, too; they may come in any shards."""
    expected = _expected(name, named)
    fits = True
    for label, x in _placed(named).items():
        if tuple(x.placements) == expected[label]:
            continue
        if not label.startswith("grad"):
            raise ValueError(
                f"{name}: expected {label} placed as {expected[label]}, like the other tensors "
                f"of the call, got {tuple(x.placements)}"
            )
        fits = False
    return fits


def _multi_state_rules(name: str, op: OpOverload) -> Callable[..., _Rules]:
    returned = [x.name for x in op._schema.returns]

    def result(label: str, kind: str, per_head: bool) -> Placement:
        if label == "scores" and kind == "heads" and not per_head:
            return Partial()
        return _placement(label, kind, per_head)

    def rules(*args: Any) -> _Rules:
        named = dict(zip(_LABELS[name], args, strict=True))
        fits, per_head, placed = _check_multi_state(name, named), _per_head(named), _placed(named)
        some = named["k" if "k" in named else "position"]
        # DTensor moves nothing if all fits. If not it is free to choose, of what is right for any.
        any_split = fits or some.shape[1] % some.device_mesh.size() == 0
        return [
            (
                [result(label, kind, per_head) for label in returned],
                [_placement(x, kind, per_head) if x in placed else None for x in named],
            )
            for kind in ("whole", "rows", "heads")
            if kind != "heads" or any_split
        ]

    return rules


def _register() -> None:
    for namespace, name in itertools.product(backend.LIBRARIES, _LABELS):
        op = _operator(namespace, name)
        rules = _scan_rules if name in _SCANS else _multi_state_rules
        register_sharding(op)(rules(name, op))


_register()


def _total(name: str, scores: DTensor) -> DTensor:
    """Partial sums added up in one order, which an all-reduce does not promise."""
    mesh, placements, local = scores.device_mesh, list(scores.placements), scores.to_local()
    for i, placement in enumerate(placements):
        if placement.is_partial():
            local = Exchange.among(name, mesh.get_group(i)).gather(local).sum(0)
            placements[i] = Replicate()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=scores.shape, stride=scores.stride()
    )


def arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op, checked before anything is sent or written.

    cu_seqlens and valid may be plain tensors, the same on every rank; scores may be partial sums.
    """
    named = dict(zip(_LABELS[name], args, strict=True))
    example_label, example = next(iter(_placed(named).items()))
    mesh = example.device_mesh
    for label, x in named.items():
        if not isinstance(x, Tensor):
            continue
        if label in _SAME_EVERYWHERE and not isinstance(x, DTensor):
            named[label] = x = replicated(x, mesh)
        if not isinstance(x, DTensor) or x.device_mesh != mesh:
            got = f"one on {x.device_mesh}" if isinstance(x, DTensor) else "a plain tensor"
            raise ValueError(
                f"{name}: expected {label} to be a DTensor on the mesh of {example_label}, {mesh}, "
                f"got {got}"
            )
    if "scores" in named:
        named["scores"] = _total(name, named["scores"])
    if torch.compiler.is_compiling():  # the rules check
        return tuple(named.values())
    if name in _SCANS:
        _check_scan(name, named)
    else:
        for label in ("valid", "scores"):
            if named.get(label) is not None:
                named[label] = named[label].redistribute(placements=_expected(name, named)[label])
        _check_multi_state(name, named)
    return tuple(named.values())


def distribute_state(
    state: MultiState, device_mesh: DeviceMesh, placements: Sequence[Placement]
) -> MultiState:
    """A multi-state whose tensors are DTensors: each rank keeps its part of the given one.

    ``attend_evict`` and the other functions then take q, k and v that are DTensors placed likewise,
    and every rank attends and evicts for its own rows and heads. Nothing is sent but by
    ``state.reorder``, which moves rows between ranks, and where heads are sharded and the layer
    decides by their scores (TOVA and H2O with scope ``"layer"``): ``attend_evict`` and ``evict``
    then add them up in one order, and ranks each send 4·B·(N+1) bytes. ``attend_prompt``
    and ``attend_sequence`` want whole heads there.

    Args:
        state: the whole, the same on every rank.
        device_mesh: where to.
        placements: one for each dimension of the mesh: ``Replicate()``, ``Shard(0)`` (rows) or
            ``Shard(1)`` (heads; what a layer decides for all of them, such as its ``position``
            with scope ``"layer"``, is whole then).

    Returns:
        A copy of what this rank keeps.

    Raises:
        TypeError, ValueError: not a state, another placement, fewer rows than ranks, heads that do
            not go into equal parts.

    On eight processes, such as ``torchrun --nproc-per-node 8`` starts:

    >>> import msrnn_ops as ms
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from torch.distributed.tensor import Shard
    >>> mesh = init_device_mesh("cpu", (2, 4))  # doctest: +SKIP
    >>> state = ms.MultiState(ms.Policy.tova(512, "head"), batch=4, kv_heads=8, head_dim=64)
    >>> state = distribute_state(state, mesh, [Shard(0), Shard(1)])  # doctest: +SKIP
    """
    if not isinstance(state, MultiState):
        raise errors.kind("distribute_state", "state", "a MultiState", state)
    rows, heads = state.keys.shape[:2]
    kinds = _check_kinds("distribute_state", "a state", placements, device_mesh, rows, heads)
    per_head = state.position.shape[1] == heads
    tensors = []
    for label, x in zip(state.TENSORS, state.tensors(), strict=True):
        parts = [_placement(label, kind, per_head) for kind in kinds]
        # What is whole would share its memory with the given state.
        tensors.append(distribute_tensor(x, device_mesh, parts, src_data_rank=None).clone())
    return restore(tensors, state.policy)
