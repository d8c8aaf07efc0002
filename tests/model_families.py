"""Tiny random models of the decoder families of transformers, and how a MultiStateCache fares.

``python tests/model_families.py`` writes docs/model_families.md anew, and with names checks these.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import msrnn_ops as ms
from msrnn_ops.transformers import MultiStateCache

CACHE = "cache" if hasattr(transformers.cache_utils, "DynamicIndexedLayer") else "past_key_values"
VOCABULARY, WINDOW, SLIDING = 97, 8, 4

# Sizes under all the names that families have for them; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": SLIDING,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_heads": 4,
    "num_kv_shared_layers": 0,
}
# What a family needs besides.
_GEMMA4 = {
    "global_head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3n_text": _GEMMA4 | {"num_kv_shared_layers": 1},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
QUICK = [
    *("bert", "deepseek_v3", "doge", "gemma3_text", "gemma4_text", "glm4_moe_lite", "gpt2"),
    *("gpt_bigcode", "gpt_oss", "jetmoe", "llama", "qwen3_moe", "rwkv", "xlstm"),
]
TABLE = Path(__file__).parents[1] / "docs" / "model_families.md"
_INTRODUCTION = """\
# Model families

`python tests/model_families.py` makes this table. It builds a tiny random model of every family
that transformers lists for causal language modelling, here of transformers {version}, and generates
with it.

**{count} families are exact**: with enough slots, logits and greedy tokens equal those of the stock
model and its own cache, for rows with padding and without, in prompts, steps and calls of several
tokens; and `Policy.window` gives what the stock model gives under a mask that hides all but the
window. The others are refused by `MultiStateCache(policy, config)`, for the reason that the table
gives.

| family | result | reason |
|---|---|---|
"""


def families() -> list[str]:
    """Names of model types that have a model for causal language modelling."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str) -> Any:
    """A model with random weights, large enough that tokens are not ambiguous."""
    config_class = type(transformers.AutoConfig.for_model(family))
    known = config_class()
    takes = {**known.to_dict(), **dict.fromkeys(known.attribute_map)}
    sizes = {name: value for name, value in SIZES.items() if name in takes}
    for name in ("q_lora_rank", "sliding_window", "v_head_dim"):
        if name in sizes and takes[name] is None:
            del sizes[name]
    if "encoder_attention_heads" in sizes:  # which some call num_key_value_heads
        sizes.pop("num_key_value_heads", None)
    if "qk_rope_head_dim" in sizes and "head_dim" in sizes:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    options = {**sizes, **OPTIONS.get(family, {})}
    config = config_class(**options)
    cached = transformers.DynamicCache(config=config.get_text_config(decoder=True))
    if cached.layers and all(cached.is_sliding):
        if not getattr(config, "layer_types", None):
            options["sliding_window"] = None
        elif set(config.layer_types) == {"sliding_attention"}:
            options["layer_types"] = ["sliding_attention", "full_attention"]
        config = config_class(**options)
    with torch.device("meta"):
        size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 3e6:
        raise ValueError(f"expected a tiny model, got {size:.0e} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(min(8.0, 0.15 / float(parameter.std().clamp(min=1e-6))))
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and their mask."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, VOCABULARY, mask.shape) * mask, mask


def calls(model: Any, cache: Any, tokens: Tensor, mask: Tensor, hide: int = 0) -> list[Tensor]:
    """Logits of a prompt, of steps, and of several tokens; of real tokens alone.

    ``hide``: a mask hides from steps all but so many tokens before them.
    """
    results, start = [], 0
    for new in (11, 1, 1, 1, 1) if hide else (11, 1, 1, 3, 1):
        end = start + new
        seen = mask[:, :end].clone()
        at = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
        if hide and start:
            seen[:, : start - hide] = 0
        options = {"attention_mask": seen, "position_ids": at, CACHE: cache, "use_cache": True}
        logits = model(tokens[:, start:end], **options).logits
        results.append(logits[mask[:, start:end].bool()])
        start = end
    return results


def compare(model: Any) -> None:
    """Raises AssertionError where tokens or logits differ from the stock model's."""
    ours, stock = copy.deepcopy(model), model
    ours.set_attn_implementation("msrnn")
    ample = ms.Policy.tova(64)

    def full() -> Any:
        return transformers.DynamicCache(config=stock.config.get_text_config(decoder=True))

    def equal(found: list[Tensor], exact: list[Tensor], what: str) -> None:
        for step, (a, b) in enumerate(zip(found, exact, strict=True)):
            error = float((a - b).abs().max() / b.abs().max())
            assert error < 1e-3, f"{what}, call {step}: off by {error:.1e}"

    states = MultiStateCache(ample, ours.config).layers
    assert not all(layer.is_sliding for layer in states), "no layer that attends to all tokens"
    torch.manual_seed(1)
    for lengths in ((17, 17), (17, 12)):
        tokens, mask = prompts(*lengths)
        cache = MultiStateCache(ample, ours.config)
        name = "padded rows" if lengths[1] < 17 else "rows"
        equal(calls(ours, cache, tokens, mask), calls(stock, full(), tokens, mask), name)
        small = MultiStateCache(ms.Policy.window(WINDOW), ours.config)
        found = calls(ours, small, tokens, mask)[:3]
        equal(found, calls(stock, full(), tokens, mask, hide=WINDOW)[:3], f"a window of {name}")
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "use_cache": True}
        prompt = {"inputs": tokens, "attention_mask": mask}
        cache = MultiStateCache(ample, ours.config)
        tokens_found = ours.generate(**prompt, **options, **{CACHE: cache})
        exact = stock.generate(**prompt, **options, **{CACHE: full()})
        assert torch.equal(tokens_found, exact), f"generated tokens of {name}"


def check(family: str) -> tuple[str, str]:
    """("exact", ""), ("refused", why), ("differs", how), or ("not built", why)."""
    config = transformers.AutoConfig.for_model(family)
    if config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder:
        return "not built", "it has another family inside"
    with torch.no_grad():
        try:
            model = build(family)
        except Exception as error:
            try:
                MultiStateCache(ms.Policy.tova(64), config)
            except (NotImplementedError, ValueError) as refused:
                return "refused", str(refused)
            return "not built", f"{type(error).__name__}: {error}"
        try:
            MultiStateCache(ms.Policy.tova(64), model.config)
        except (NotImplementedError, ValueError) as error:
            return "refused", str(error)
        try:
            compare(model)
        except AssertionError as error:
            return "differs", str(error)
        except Exception as error:
            return "raises", f"{type(error).__name__}: {error}"
    return "exact", ""


def _check_into(family: str, connection: Any) -> None:
    connection.send(check(family))


def sweep(names: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each in a process of its own, for a minute: some families are large whatever is asked for."""
    context = multiprocessing.get_context("fork")
    for family in names:
        here, there = context.Pipe(False)
        process = context.Process(target=_check_into, args=(family, there))
        process.start()
        there.close()
        result = ("not built", "no result within a minute")
        try:
            if here.poll(60):
                result = here.recv()
        except EOFError:
            result = ("not built", "the process died")
        process.kill()
        process.join()
        yield family, result


def row(family: str, result: tuple[str, str]) -> str:
    """A line of the table."""
    return f"| `{family}` | {result[0]} | {result[1].rpartition(f'got {family} with ')[2]} |"


def table(results: dict[str, tuple[str, str]]) -> str:
    """The page of the documentation."""
    wrong = {x: y for x, y in results.items() if y[0] not in ("exact", "refused", "not built")}
    if wrong:
        raise AssertionError(f"neither exact nor refused: {wrong}")
    count = sum(kind == "exact" for kind, _ in results.values())
    rows = [row(*item) for item in results.items() if item[1][0] != "not built"]
    left = [f"`{family}`" for family, (kind, _) in results.items() if kind == "not built"]
    text = _INTRODUCTION.format(version=transformers.__version__, count=count) + "\n".join(rows)
    end = "Not tested, most of them because they wrap another family: " + ", ".join(left) + "."
    return f"{text}\n\n{textwrap.fill(end, 100)}\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for name, result in sweep(sys.argv[1:] or families()):
        found[name] = result
        print(row(name, result), flush=True)
    if not sys.argv[1:]:
        TABLE.write_text(table(found))
