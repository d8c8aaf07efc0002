"""What the plugin does in a step, without vLLM: settings, states in a KV cache, rows of a batch.

A block of the cache is a row of each layer's state. vLLM orders a batch so that requests with one
token come first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msrnn_ops import distributed, errors
from msrnn_ops.exchange import Group
from msrnn_ops.multi_state import attend_evict, attend_evict_unchecked, attend_prompt
from msrnn_ops.state import MultiState, Policy, restore

_POLICIES: dict[str, Callable[..., Policy]] = {
    "tova": Policy.tova,
    "window": Policy.window,
    "window_sinks": Policy.window_sinks,
    "h2o": Policy.h2o,
}
_SETTINGS = "additional_config['msrnn']"


def settings_in(additional_config: object) -> object:
    """The plugin's settings, or None. vLLM passes on any object."""
    return additional_config.get("msrnn") if isinstance(additional_config, Mapping) else None


def policy_of(settings: object) -> Policy:
    """The policy that ``{"policy": "tova", "slots": 512, ...}`` asks for.

    Raises:
        ValueError: a wrong key or value, with its name.
    """
    if not isinstance(settings, Mapping):
        expected = '{"policy": ..., "slots": ...}'
        raise errors.value(_SETTINGS, expected, repr(settings))
    name = settings.get("policy")
    if not isinstance(name, str) or name not in _POLICIES:
        among = ", ".join(map(repr, _POLICIES))
        raise errors.value(_SETTINGS, f"policy among {among}", repr(name))
    make = _POLICIES[name]
    parameters = inspect.signature(make).parameters
    given = {key: value for key, value in settings.items() if key != "policy"}
    for key in given:
        if key not in parameters:
            among = ", ".join(map(repr, parameters))
            raise errors.value(_SETTINGS, f"of policy {name!r} keys among {among}", repr(key))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise errors.value(_SETTINGS, f"of policy {name!r} a key {key!r}", sorted(given))
    try:
        return make(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_SETTINGS}: {error}") from error


def state_in(kv_cache: Tensor, policy: Policy) -> MultiState:
    """An empty state of a row a block, with keys and values where vLLM keeps a layer's cache.

    The first half of the memory holds all keys and the second half all values. Marks lie beside it.

    Args:
        kv_cache: (blocks, Hkv, N+1, 2 Dh), contiguous.
        policy: of N slots.
    """
    blocks, heads, slots, both = kv_cache.shape
    if slots != policy.slots + 1 or not kv_cache.is_contiguous():
        raise errors.value(
            "msrnn",
            f"a contiguous cache of {policy.slots + 1} slots in each block",
            f"shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}",
        )
    keys, values = kv_cache.view(2, blocks, heads, slots, both // 2)
    like = MultiState(
        policy,
        batch=blocks,
        kv_heads=heads,
        head_dim=both // 2,
        dtype=kv_cache.dtype,
        device="meta",
    )
    marks = [torch.empty_like(x, device=kv_cache.device) for x in like.tensors()[2:]]
    state = restore([keys, values, *marks], policy)
    state.reset()
    return state


@dataclass
class Batch:
    """Whose tokens a step brings: first some requests of one token each, then prompts."""

    rows: Tensor  # (tokens of the first kind,); -1: padding
    prompts: Tensor  # (prompts,)
    cu_seqlens: Tensor  # (prompts + 1,), from the first prompt on; the CPU has it
    tokens: int

    @classmethod
    def of(
        cls,
        blocks: Tensor,
        query_start: Tensor,
        query_start_cpu: Tensor,
        lengths_cpu: Tensor,
        tokens: int,
        buffer: Tensor,
    ) -> tuple[Batch, Tensor]:
        """The batch, and the rows that start anew, whatever their blocks held.

        Args:
            blocks: (requests,), each one's block; 0, which vLLM gives to none: padding.
            query_start, query_start_cpu: (requests + 1,), where each one's tokens start.
            lengths_cpu: (requests,), tokens that each has after this step.
            tokens: of the step, padding included.
            buffer: int32, where rows are written: a CUDA graph reads them at the same address.
        """
        new = query_start_cpu[1:] - query_start_cpu[:-1]
        long = (new > 1).nonzero()
        singles = int(long[0]) if len(long) else len(new)
        single_tokens = int(query_start_cpu[singles]) if len(long) else tokens
        padding = (blocks == 0) | (query_start[1:] == query_start[:-1])
        blocks = blocks.masked_fill(padding, -1)
        buffer[:singles] = blocks[:singles]
        buffer[singles:single_tokens] = -1
        fresh = ((lengths_cpu == new) & (new > 0)).nonzero()[:, 0].to(blocks.device)
        cu_seqlens = query_start_cpu[singles:] - query_start_cpu[singles]
        batch = cls(buffer[:single_tokens], blocks[singles:], cu_seqlens, tokens)
        return batch, blocks[fresh]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MultiState,
        scale: float,
        group: Group,
        out: Tensor,
    ) -> None:
        """Attention of one layer, into ``out``: (tokens or more, Hq, Dh), as q.

        ``group`` has the ranks among which heads are sharded. None: there is one.
        """
        singles = len(self.rows)
        if group is None and singles == len(q) == len(out):  # most steps
            out.copy_(attend_evict_unchecked(q, k, v, state, self.rows, scale))
            return
        token: Callable[..., Tensor] = attend_evict
        prompt: Callable[..., Tensor] = attend_prompt
        if group is not None:
            token = partial(distributed.attend_evict, group=group)
            prompt = partial(distributed.attend_prompt, group=group)
        if singles:
            one = slice(singles)
            out[one] = token(q[one], k[one], v[one], state, rows=self.rows, scale=scale)
        if len(self.prompts):
            some = slice(singles, self.tokens)
            packed = {"rows": self.prompts, "cu_seqlens": self.cu_seqlens}
            out[some] = prompt(q[some], k[some], v[some], state, scale=scale, **packed)
