"""A plugin that lets vLLM serve with a bounded state: one KV-cache block a request.

vLLM finds :func:`register` by its entry point. Where no policy is configured, vLLM stays as it is.
backend.py has the attention, batch.py what a step does, without vLLM, and scheduler.py what a
preempted request needs.
"""

from __future__ import annotations

from typing import Any

from msrnn_ops import errors
from msrnn_ops.vllm.batch import settings_in

# Of these, the CPU takes the path, whatever --attention-backend says.
_ON_CPUS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")


def register() -> None:
    """Names the backend ``CUSTOM``, as vLLM asks its plugins to do in each of its processes."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "msrnn_ops.vllm.backend.Backend")
    for name in _ON_CPUS:
        register_backend(AttentionBackendEnum[name], f"msrnn_ops.vllm.{name}")


def __getattr__(name: str) -> Any:
    """The backend that a CPU takes for a layer: vLLM's own, unless a policy is configured."""
    if name not in _ON_CPUS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config_or_none()
    custom = config is not None and config.attention_config.backend is AttentionBackendEnum.CUSTOM
    if config is not None and settings_in(config.additional_config) is not None and not custom:
        raise errors.value(
            "msrnn",
            "attention_backend 'CUSTOM' where additional_config has 'msrnn'",
            config.attention_config.backend,
        )
    if not custom:
        return resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    if name != "CPU_ATTN":
        raise errors.value(
            "msrnn", "a model with keys and values of each head", "multi-head latent attention"
        )
    return resolve_obj_by_qualname("msrnn_ops.vllm.backend.Backend")
