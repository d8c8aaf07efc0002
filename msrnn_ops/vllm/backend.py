"""The attention backend ``CUSTOM`` of vLLM: what it refuses, its metadata, its layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheLayout,
    replace_as,
)

from msrnn_ops import errors
from msrnn_ops.exchange import Group
from msrnn_ops.state import MultiState, Policy, check_head_dim
from msrnn_ops.vllm.batch import Batch, policy_of, settings_in, state_in

_CALLER = "msrnn"


class Backend(AttentionBackend):  # type: ignore[misc]
    """A layer's cache is a block of N+1 slots for each request, which it holds for life."""

    supported_dtypes: ClassVar = [torch.float32, torch.float16, torch.bfloat16]
    policy: ClassVar[Policy | None] = None  # of this process's model, whose layers set it

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Layer]:
        return Layer

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # each layer's cache is contiguous

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """One block a request, without slots for tokens and not shared by prefix."""
        if type(spec) is not FullAttentionSpec or spec.non_causal:
            raise errors.value(
                _CALLER, "layers that attend to all tokens before", f"a {type(spec).__name__}"
            )
        assert cls.policy is not None
        others = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, CircularBufferSpec, drop=others, block_size=cls.policy.slots + 1)


class Builder(AttentionMetadataBuilder[Batch]):  # type: ignore[misc]
    """Makes a step's batch, once for all layers, and empties the rows of new requests."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        for name, layer in layers.items():
            if not isinstance(getattr(layer, "impl", None), Layer):
                raise errors.value(
                    _CALLER,
                    "a model whose layers all attend to all tokens, for vLLM lays caches of "
                    "several kinds over each other",
                    f"{name}, a {type(layer).__name__} of another backend",
                )
        self._layers = [layers[name] for name in layer_names]
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows = torch.full((tokens,), -1, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Batch:
        m: CommonAttentionMetadata = common_attn_metadata
        lengths = m.seq_lens_cpu_upper_bound  # exact without speculation
        batch, fresh = Batch.of(
            m.block_table_tensor[: m.num_reqs, 0],
            m.query_start_loc[: m.num_reqs + 1],
            m.query_start_loc_cpu[: m.num_reqs + 1],
            (m.seq_lens.cpu() if lengths is None else lengths)[: m.num_reqs],
            m.num_actual_tokens,
            self._rows,
        )
        if len(fresh):
            for layer in self._layers:
                layer.impl.state_in(layer.kv_cache).reset(fresh)
        return batch

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Batch:
        for layer in self._layers:  # not within a capture
            layer.impl.state_in(layer.kv_cache)
        return self.build(0, common_attn_metadata)


class Layer(AttentionImpl[Batch]):  # type: ignore[misc]
    """The attention of one layer, with the states of all requests."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        config = get_current_vllm_config()
        self.policy = Backend.policy = policy_of(settings_in(config.additional_config))
        _check(config, self.policy)
        for name, value in {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **others,
        }.items():
            if value is not None:
                got = f"{name} {value}" if isinstance(value, int | float | str) else name
                raise errors.value(_CALLER, "plain attention to all tokens in each layer", got)
        if attn_type != AttentionType.DECODER:
            raise errors.value(_CALLER, "layers of a decoder", f"attention of type {attn_type!r}")
        dtype = config.model_config.dtype
        if kv_cache_dtype_str_to_dtype(kv_cache_dtype, config.model_config) != dtype:
            raise errors.value(_CALLER, f"kv_cache_dtype 'auto' or {dtype}", repr(kv_cache_dtype))
        check_head_dim(_CALLER, head_size)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        several = config.parallel_config.tensor_parallel_size > 1
        self._group: Group = get_tp_group().device_group if several else None
        self._state: MultiState | None = None

    def state_in(self, kv_cache: Tensor) -> MultiState:
        """The states in this cache, empty when it is first seen."""
        if self._state is None or self._state.keys.data_ptr() != kv_cache.data_ptr():
            self._state = state_in(kv_cache, self.policy)
        return self._state

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        state = self.state_in(kv_cache)
        attn_metadata.attend(query, key, value, state, self.scale, self._group, output)
        return output


def _check(config: VllmConfig, policy: Policy) -> None:
    """Raises where vLLM is asked for what a bounded state cannot do."""
    parallel, model = config.parallel_config, config.model_config
    ranks, heads = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    for unsupported, expected, got in (
        (config.speculative_config, "no speculation", "a speculative_config"),
        (
            config.kv_transfer_config,
            "neither transfer nor offloading of KV caches",
            "a kv_transfer_config",  # which vLLM makes of kv_offloading_size, too
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode_context_parallel_size 1",
            parallel.decode_context_parallel_size,
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill_context_parallel_size 1",
            parallel.prefill_context_parallel_size,
        ),
        (
            policy.scope == "head" and policy.score != "position" and ranks > heads,
            "scope 'layer', or as many key-value heads as ranks, each of which decides for its own",
            f"scope 'head', {heads} key-value heads and tensor_parallel_size {ranks}",
        ),
        (model.is_mm_prefix_lm, "causal attention", "a model whose images see their own future"),
        (model.is_hybrid, "a model of attention layers", "a hybrid one"),
    ):
        if unsupported:
            raise errors.value(_CALLER, expected, got)
