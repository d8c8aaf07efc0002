"""Bounded key-value caches for the decoders of Hugging Face transformers.

Importing this module registers the attention ``"msrnn"``. transformers hands a layer's keys first
to the cache and then to the attention, which gets no cache: the keys carry their layer along. In
the same way it asks the cache for the sizes of a mask right before it asks for the mask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree

from msrnn_ops import distributed, errors, multi_state
from msrnn_ops.exchange import Exchange, Group
from msrnn_ops.state import MultiState, Policy, check_head_dim

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "msrnn_ops.transformers: expected transformers >= 5.2, found none: "
        "pip install msrnn_ops[transformers]"
    ) from error
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 2):
    raise ImportError(
        f"msrnn_ops.transformers: expected transformers >= 5.2, got {transformers.__version__}: "
        "pip install msrnn_ops[transformers]"
    )

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["MultiStateCache"]

Policies: TypeAlias = (
    Policy
    | Sequence[Policy | None]
    | Mapping[Any, Policy]  # by the number of a layer or by its type
    | Callable[[int, str], Policy | None]
)

_ATTENTION = "msrnn"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What models pass to their attention that changes its weights.
_CHANGES_WEIGHTS = {"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"}


class MultiStateCache(Cache):  # type: ignore[misc]
    """A key-value cache of N states a layer, for ``model.generate`` and for the model itself.

    Every layer that attends to all tokens holds a :class:`msrnn_ops.MultiState`, made by its first
    tokens. A layer with a sliding window keeps transformers' own cache of that window. What one
    forward call brings is a prompt (:func:`msrnn_ops.attend_prompt`: full attention over it and the
    kept states, then one reduction to N) or one token (:func:`msrnn_ops.attend_evict`). So a prompt
    in chunks is reduced after each of them. Positions count a row's real tokens, without padding.
    A stored token that the ``attention_mask`` of a later call hides is dropped before that call
    attends, and makes room.

    Args:
        policy: what each layer keeps: one :class:`msrnn_ops.Policy` for all; a sequence with one
            for each layer of the model; a mapping by the number of a layer or by its type, as the
            config's ``layer_types`` has them (the number counts more); or a function of both. What
            is said of layers with a sliding window is not looked at.
        config: ``model.config`` of a decoder without cross attention, capped or biased attention
            logits, learned sinks, a cache of latents, or layers that share keys; head_dim a
            multiple of 8 up to 256, in each layer its own.
        group: the ranks among which the model's heads are sharded, as ``tp_plan="auto"`` does: a
            process group or a mesh of one dimension. None: this process has all heads.

    Raises:
        TypeError, ValueError: a wrong policy or config, no policy for a layer, a head_dim that is
            not supported; in use: a mask of another shape or that shows what was hidden before,
            another batch, dtype or device before :meth:`reset`, tokens that ``generate`` feeds a
            second time, dropout, what the ops refuse.
        NotImplementedError: another model; a mask other than causal with padding; other heads than
            the config says; offloading; tokens taken back (:meth:`crop`), as assisted decoding
            does.
        RuntimeError: in use: the attention is not ``"msrnn"``, or a gradient is asked for.

    Source: Oren et al. 2024, "Transformers are Multi-State RNNs".

    >>> import torch, transformers, msrnn_ops as ms
    >>> from msrnn_ops.transformers import MultiStateCache
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model.set_attn_implementation("msrnn")
    >>> cache = MultiStateCache(ms.Policy.window(4), model.config)
    >>> prompt = torch.arange(1, 11)[None]
    >>> model.generate(
    ...     prompt, cache=cache, max_new_tokens=3, do_sample=False, pad_token_id=0).shape
    torch.Size([1, 13])
    >>> cache.kept_positions()[0], cache.get_seq_length()
    (tensor([[[ 8,  9, 10, 11]]]), 12)

    A pyramid, whose first layers keep more (Cai et al. 2024, "PyramidKV"):

    >>> cache = MultiStateCache(lambda layer, kind: ms.Policy.tova(8 - 4 * layer), model.config)
    >>> [layer.policy.slots for layer in cache.layers]
    [8, 4]
    """

    _next_layer = 0  # whose keys come next

    def __init__(self, policy: Policies, config: Any, *, group: Group = None) -> None:
        if not isinstance(policy, Policy | Sequence | Mapping) and not callable(policy):
            expected = "a Policy, or a sequence, a mapping or a function of them"
            raise errors.kind("MultiStateCache", "policy", expected, policy)
        if not isinstance(config, transformers.PreTrainedConfig):
            raise TypeError(
                "MultiStateCache: expected config to be the configuration of a model, got "
                f"{type(config).__name__}"
            )
        config = config.get_text_config(decoder=True)
        _check_config(config)
        ranks, name = 1, None
        if group is not None:
            exchange = Exchange.among("MultiStateCache", group)
            ranks, name = exchange.ranks, exchange.group
        layers: list[Any] = []
        for i, layer in enumerate(DynamicCache(config=config).layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise NotImplementedError(
                    "MultiStateCache: expected layers of full or sliding attention, got "
                    f"{type(layer).__name__} in {config.model_type}"
                )
            if not layer.is_sliding:
                kv_heads, head_dim = _shape(_of_layer(config, i))
                if kv_heads % ranks:
                    raise ValueError(
                        f"MultiStateCache: expected key-value heads that {ranks} ranks can share, "
                        f"got {kv_heads}"
                    )
                kv_heads //= ranks
                check_head_dim("MultiStateCache", head_dim, "a config with a head_dim")
                layer = _MultiStateLayer(_policy_of(policy, config, i), kv_heads, name)
            layers.append(layer)
        if isinstance(policy, Sequence) and len(policy) != len(layers):
            expected = f"policies for {len(layers)} layers"
            raise errors.value("MultiStateCache", expected, len(policy))
        super().__init__(layers=layers)
        self._config = config
        # (B, columns) bool: for which columns of the attention mask a token was stored, and which
        # of these it still shows. None, and columns that follow: all.
        self._stored: Tensor | None = None
        self._visible: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """What a layer attends to, as transformers asks for it before the attention."""
        if layer_idx == 0:
            self._check_call(key, kwargs.get("kwargs"))
        elif layer_idx != self._next_layer or getattr(self.layers[layer_idx - 1], "waiting", False):
            raise self._out_of_order(layer_idx)
        found: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key, value, *args, **kwargs)
        self._next_layer = (layer_idx + 1) % len(self.layers)
        return found

    def _out_of_order(self, layer_idx: int) -> Exception:
        if layer_idx >= len(self.layers):
            return ValueError(
                f"MultiStateCache: expected the config of this model, got one of {len(self.layers)}"
                f" layers for a model that has a layer {layer_idx}"
            )
        return RuntimeError(
            "MultiStateCache: expected layers in their order, each after the one before has "
            f"attended, got layer {layer_idx} out of turn: a call was interrupted (then call "
            f"reset), or the attention is not {_ATTENTION!r}, or the config is of a model of more "
            "layers"
        )

    def _check_call(self, key: Tensor, options: dict[str, Any] | None) -> None:
        """Once for all layers, before any of them takes a token."""
        self._check_attention()
        if getattr(_asked, "cache", None) is self:
            _asked.cache = None
            raise _another_attention("the mask of another attention")
        layer = self.layers[0]
        tokens = layer.get_seq_length()
        for other in self.layers[1:]:
            if other.get_seq_length() != tokens or getattr(other, "waiting", False):
                raise self._out_of_order(0)
        if tokens:
            _check_rows(len(layer.keys if layer.is_sliding else layer.state.seen), key.shape[0])
        _check_positions(tokens, key.shape[2], options)

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Columns and offset of a layer's mask, as transformers asks for them before the mask.

        The slots of a layer with a state have no order of tokens: the mask function of the
        attention makes what such layers need, and others, before they are refused, one column.
        """
        self._check_attention()
        if layer_idx < len(self.layers) and not self.layers[layer_idx].is_sliding:
            _asked.cache = self
            return 1, self.layers[layer_idx].tokens
        sizes: tuple[int, int] = super().get_mask_sizes(query, layer_idx)
        return sizes

    def _check_attention(self) -> None:
        attention = self._config._attn_implementation
        if attention != _ATTENTION:
            raise _another_attention(repr(attention))

    def real_tokens(self, mask: Tensor, new: int) -> Tensor | None:
        """Of a mask (B, columns), which new tokens are real: (B, new) bool, or None for all.

        What the mask hides of the tokens before is dropped from the states. One comparison decides
        whether there is anything to do: transformers' own masks wait for the device as often.
        """
        before = self.layers[0].get_seq_length()
        if mask.shape[1] < before + new:
            raise _fed_again(before, new, f"an attention_mask of {mask.shape[1]} columns")
        mask = mask[:, : before + new]
        if self._visible is None or not before:
            if _all(mask):
                return None
            stored = visible = mask.new_ones(mask.shape[0], before)
        else:
            assert self._stored is not None
            _check_rows(len(self._visible), len(mask))
            visible = self._visible[:, :before]  # longer after a call that was interrupted
            known = visible.shape[1]
            if _all(mask[:, :known] == visible) & _all(mask[:, known:]):
                return None
            visible = pad(visible, (0, before - known), value=True)
            stored = pad(self._stored[:, :before], (0, before - known), value=True)
        old, fresh = mask[:, :before], mask[:, before:]
        if (old & ~visible).any():
            raise ValueError(
                "MultiStateCache: expected an attention_mask that hides what it has hidden before, "
                "got a 1 for a token that was hidden: padding is not stored, and a token that was "
                "hidden is gone"
            )
        if (visible & ~old).any():
            number = (stored.cumsum(1) - 1).clamp(min=0)  # of a row's stored tokens
            hidden = torch.zeros_like(number).scatter_add_(1, number, (stored & ~old).long()) > 0
            for layer in self.layers:
                if not layer.is_sliding:
                    layer.hide(hidden)
        self._stored, self._visible = torch.cat([stored, fresh], 1), mask.clone()
        return None if _all(fresh) else fresh

    def kept_positions(self) -> list[Tensor | None]:
        """Of each layer :meth:`msrnn_ops.MultiState.kept_positions`, (B, G, N) int64.

        None for layers with a sliding window, and before the first tokens.
        """
        states = (getattr(layer, "state", None) for layer in self.layers)
        return [None if state is None else state.kept_positions() for state in states]

    @property
    def nbytes(self) -> int:
        """Memory of all layers, in bytes."""
        return sum(
            layer.keys.nbytes + layer.values.nbytes if layer.is_sliding else layer.state.nbytes
            for layer in self.layers
            if layer.is_initialized
        )

    def reset(self) -> None:
        """Forgets everything, also the number of rows."""
        self._stored = self._visible = None
        self.layers: list[Any] = [
            # Not by its own reset, which leaves zeros to attend to in transformers 5.2.
            DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
            if layer.is_sliding
            else _MultiStateLayer(layer.policy, layer.kv_heads, layer.group)
            for layer in self.layers
        ]

    def crop(self, *_: Any) -> None:
        """Raises NotImplementedError: evicted states cannot come back."""
        raise NotImplementedError(
            "MultiStateCache: expected tokens to stay, got a call to take some back: assisted "
            "decoding and prompt lookup are not supported, an evicted state cannot come back"
        )

    def activate_past_recording(self) -> None:
        """Raises NotImplementedError: transformers asks for it before :meth:`crop`."""
        self.crop()

    def offload(self, *_: Any, **__: Any) -> None:
        """Raises NotImplementedError: states stay on the device of the model."""
        raise NotImplementedError(
            "MultiStateCache: expected states to stay on the device of the model, got a call to "
            "move one: offloading is not supported, and a bounded state needs it less"
        )

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row comes ``repeats`` times."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, 0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows alone."""
        self._change_rows(lambda x: x[indices])
        super().batch_select_indices(indices)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._stored is not None and self._visible is not None:
            self._stored, self._visible = change(self._stored), change(self._visible)


# .cache: what told the sizes of the mask that _mask is asked for next; .masked: whether this call
# has an attention_mask.
_asked = threading.local()


def _another_attention(found: str) -> RuntimeError:
    return RuntimeError(
        f"MultiStateCache: expected the attention {_ATTENTION!r}, got {found}: call "
        f"model.set_attn_implementation({_ATTENTION!r}), and pass model.config itself"
    )


def _fed_again(before: int, new: int, found: str) -> ValueError:
    return ValueError(
        f"MultiStateCache: expected {new} tokens that follow {before} in the cache, got {found}. "
        "generate feeds everything again if it gets no more tokens than the cache has seen (pass "
        "all of them and more, or call cache.reset()), and also with use_cache=False, which may "
        "come from the model's configuration (pass use_cache=True)"
    )


def _check_positions(before: int, new: int, options: dict[str, Any] | None) -> None:
    """Of a call without a mask: newer releases leave out a mask of ones in generate."""
    if not 0 < before <= new or not options or getattr(_asked, "masked", False):
        return
    if torch.compiler.is_compiling():  # generate compiles no call that has such a cache
        return
    position_ids = options.get("position_ids")
    if position_ids is not None and not position_ids[..., 0].any():
        raise _fed_again(before, new, f"{new} that begin at position 0")


def _all(mask: Tensor) -> Any:
    """``mask.all()``, of many bytes in a twentieth of its time on a CPU."""
    return mask.view(torch.uint8).amin() if mask.numel() else True


def _check_rows(expected: int, found: int) -> None:
    if found != expected:
        raise ValueError(
            f"MultiStateCache: expected a batch of {expected} rows as in the calls before, got "
            f"{found}: call cache.reset() before another batch"
        )


# Decoders that nothing else tells from others, and what is in their way.
_REFUSED_MODELS = {
    "bigbird_pegasus": "an attention that counts as bidirectional",
    "diffllama": "two attentions to the same keys",
    "doge": "a mask that depends on the values",
    "dory": "layers that run several times",
    "jetmoe": "keys that are repeated behind the cache",
    **dict.fromkeys(
        ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), "learned sinks"
    ),
}


def _policy_of(policies: Policies, config: Any, layer: int) -> Policy:
    """What a layer keeps, by one of the ways to say it."""
    if isinstance(policies, Policy):
        return policies
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types else "full_attention"
    found: Any = None
    if isinstance(policies, Mapping):
        found = policies.get(layer, policies.get(kind))
    elif not isinstance(policies, Sequence):
        found = policies(layer, kind)
    elif layer < len(policies):
        found = policies[layer]
    if not isinstance(found, Policy):
        name = f"policy of layer {layer} ({kind})"
        raise errors.kind("MultiStateCache", name, "a Policy", found)
    return found


def _of_layer(config: Any, layer: int) -> Any:
    """The config of a layer: some models have other heads in some layers."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def _check_config(config: Any) -> None:
    one = _of_layer(config, 0)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    reason = _REFUSED_MODELS.get(config.model_type)
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    refused = {
        "an encoder": config.is_encoder_decoder,
        "attention to later tokens (is_decoder=False)": getattr(config, "is_decoder", None)
        is False,
        "cross attention": getattr(config, "add_cross_attention", False),
        "no attention heads": not getattr(one, "num_attention_heads", None),
        "an attention that transformers cannot replace": (
            model is not None and not model._can_set_attn_implementation()
        ),
        "attn_logit_softcapping": getattr(one, "attn_logit_softcapping", None),
        "a cache of latents (kv_lora_rank)": getattr(one, "kv_lora_rank", None),
        "layers that share keys": getattr(config, "num_kv_shared_layers", None),
        f"layers of {' and '.join(other_layers)}": other_layers,
        str(reason): reason,
    }
    found = [name for name, there in refused.items() if there]
    if found:
        raise NotImplementedError(
            "MultiStateCache: expected a decoder whose layers attend to all tokens or to a sliding "
            f"window, got {config.model_type} with {' and '.join(found)}"
        )


def _shape(config: Any) -> tuple[int, int]:
    """Key-value heads and head_dim of a layer, by its config."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "multi_query", False):
        kv_heads = 1
    head_dim = getattr(config, "head_dim", None)
    return kv_heads, head_dim or config.hidden_size // config.num_attention_heads


class _MultiStateLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's state, and what transformers asks of it."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    step: multi_state.DecoderStep | None = None  # of its state, after a first token

    def __init__(self, policy: Policy, kv_heads: int, group: str | None) -> None:
        super().__init__()
        self.policy = policy
        self.kv_heads = kv_heads
        self.group = group
        self.attend_prompt: Any = multi_state.attend_prompt
        if group is not None:
            self.attend_prompt = partial(distributed.attend_prompt, group=group)
        self.state: MultiState | None = None
        self.tokens = 0  # of the longest row, padding included: positions depend on it
        self.waiting = False  # for the attention function

    def lazy_initialization(self, key: Tensor, value: Tensor) -> None:
        batch, kv_heads, _, head_dim = key.shape
        if kv_heads != self.kv_heads:  # of some heads alone, each rank would keep other tokens
            raise NotImplementedError(
                f"MultiStateCache: expected {self.kv_heads} key-value heads as in the config, got "
                f"{kv_heads}: models that cache other heads are not supported; if heads are "
                "sharded over ranks, say so by group="
            )
        with torch.inference_mode(False):  # the state may outlive it
            self.state = MultiState(
                self.policy,
                batch=batch,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=key.dtype,
                device=key.device,
            )
        self.is_initialized = True

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.waiting:
            raise RuntimeError(
                f"MultiStateCache: expected the attention {_ATTENTION!r} to take the keys that "
                "update returned; this model changes or bypasses them, or a call was interrupted "
                "(then call reset)"
            )
        kept = self.state.keys if self.state is not None and self.tokens else None
        if kept is None or not key.dtype == value.dtype == kept.dtype or key.device != kept.device:
            key, value = self._as_stored(key, value)
        self.waiting = True
        key.multi_state_layer = self  # type: ignore[attr-defined]
        return key, value

    def _as_stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in the dtype of the state, which the first ones make."""
        if torch.is_autocast_enabled(key.device.type):  # rotary embedding leaves float32
            dtype = torch.get_autocast_dtype(key.device.type)
            key, value = key.to(dtype), value.to(dtype)
        if not self.tokens:  # also after a first call that was refused
            self.lazy_initialization(key, value)
        state = self.state
        assert state is not None
        if key.dtype != state.dtype or key.device != state.device:
            raise TypeError(
                f"MultiStateCache: expected a model in {state.dtype} on {state.device} as in the "
                f"calls before, got keys in {key.dtype} on {key.device}: call cache.reset() before "
                "a model of another dtype or device"
            )
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float | None
    ) -> Tensor:
        """The output (B, T, Hq, Dh); valid (B, T) bool, False at padding."""
        assert self.state is not None  # update has made it
        new = query.shape[2]
        if query.dtype != key.dtype:
            query = query.to(key.dtype)
        if valid is None and new == 1:
            if self.group is not None:
                q, k, v = query.squeeze(2), key.squeeze(2), value.squeeze(2)
                out = distributed.attend_evict(
                    q, k, v, self.state, scale=scale, group=self.group
                ).unsqueeze(1)
            else:
                step = self.step
                if step is None or step.state is not self.state or step.scale != scale:
                    step = self.step = multi_state.DecoderStep(self.state, scale)
                out = step(query, key, value)
        else:
            out = self.attend_prompt(query, key, value, self.state, valid=valid, scale=scale)
            out = out.transpose(1, 2).contiguous()
        self.tokens += new
        return out

    def hide(self, hidden: Tensor) -> None:
        """Drops the tokens that ``hidden``, (B, tokens) bool, says True for by their number."""
        if self.state is None:
            return
        position = self.state.position
        number = position.clamp(min=0).flatten(1)
        gone = hidden.gather(1, number).view_as(position) & (position >= 0)
        position.masked_fill_(gone, -1)
        if self.state.score.numel():
            self.state.score.masked_fill_(gone, 0)

    def get_mask_sizes(self, _: Any) -> tuple[int, int]:
        return 0, self.tokens

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1  # any number of tokens

    get_max_cache_shape = get_max_length  # its name in transformers 5.2

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.state.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = _pytree.tree_map(lambda x: x.repeat_interleave(repeats, 0), self.state)
            self.step = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = _pytree.tree_map(lambda x: x[indices], self.state)
            self.step = None


def _mask(**kwargs: Any) -> Tensor | None:
    """transformers' own mask; for layers with a state (B, T), False at padding, or None."""
    cache: MultiStateCache | None = getattr(_asked, "cache", None)
    _asked.cache, _asked.masked = None, kwargs["attention_mask"] is not None
    if cache is None:
        return sdpa_mask(**kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        return torch.empty(1, 1, 1, 0)  # refused by the attention of a layer that gets it
    mask: Tensor | None = kwargs["attention_mask"]
    if mask is None:
        return None
    batch = kwargs["batch_size"]
    if mask.dim() != 2 or len(mask) != batch:
        expected = f"(B, tokens so far) with B = {batch}"
        raise errors.shape("MultiStateCache", "an attention_mask", expected, mask)
    new = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])  # 5.2
    return cache.real_tokens(mask, new)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention "msrnn": of the layer's state if it has one, otherwise transformers' sdpa."""
    if not _CHANGES_WEIGHTS.isdisjoint(kwargs):
        _check_weights(module, kwargs)
    layer: _MultiStateLayer | None = getattr(key, "multi_state_layer", None)
    if layer is None:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return out, None
    if not layer.waiting:
        raise NotImplementedError(
            "MultiStateCache: expected one attention to each layer's new keys, got a second one"
        )
    layer.waiting = False
    if dropout:
        raise ValueError(f"MultiStateCache: expected model.eval(), got dropout {dropout}")
    if attention_mask is None:
        if layer.tokens <= query.shape[2]:
            _check_positions(layer.tokens, query.shape[2], kwargs)
    elif attention_mask.dim() != 2:
        raise NotImplementedError(
            "MultiStateCache: expected causal attention with padding, an attention_mask of shape "
            f"(B, T), got another mask, {tuple(attention_mask.shape)}, such as that of images "
            "whose tokens see each other"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError("MultiStateCache: expected causal attention, got bidirectional")
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            "MultiStateCache: expected a layer that attends to all tokens, got one with a sliding "
            "window: pass the config of this model"
        )
    return layer.attend(query, key, value, attention_mask, scaling), None


def _check_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    for name in sorted(_CHANGES_WEIGHTS & kwargs.keys()):
        if kwargs[name] is not None:
            raise NotImplementedError(
                f"attention {_ATTENTION!r}: expected a model without {name}, got "
                f"{type(module).__name__}"
            )


transformers.AttentionInterface.register(_ATTENTION, _attend)
transformers.AttentionMaskInterface.register(_ATTENTION, _mask)
