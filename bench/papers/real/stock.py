"""With a state for every token, generate writes what it writes with transformers' own cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import msrnn_ops as ms
from bench.papers.part import Options, Section, Store
from bench.papers.real import source
from bench.papers.real.subject import texts_of
from bench.table import Table, say
from msrnn_ops.transformers import MultiStateCache

_PROMPT, _NEW = 300, 24
_MODELS = ("smollm2", "gemma3")
_WAYS = ("one prompt", "left-padded", "three beams", "a prompt in chunks", "two turns")


def _generated(
    model: Any, ids: Tensor, mask: Tensor, cache: MultiStateCache | None, **more: Any
) -> Tensor:
    """The tokens after these, greedily."""
    model.set_attn_implementation("sdpa" if cache is None else "msrnn")
    if cache is not None:
        more["past_key_values"] = cache
    settings = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, eos_token_id=None, **settings, **more)
    new: Tensor = found[:, ids.shape[1] :]
    return new


def _written(model: Any, ids: Tensor, way: str, bounded: bool) -> Tensor:
    cache = MultiStateCache(ms.Policy.tova(4 * _PROMPT), model.config) if bounded else None
    if way == "left-padded":
        short = ids.shape[1] // 5
        rows, mask = ids.repeat(2, 1), torch.ones_like(ids).repeat(2, 1)
        rows[1, :-short], mask[1, :-short] = 0, 0
        return _generated(model, rows, mask, cache)
    more = {"num_beams": 3} if way == "three beams" else {}
    if way == "a prompt in chunks" and bounded:
        more = {"prefill_chunk_size": 64}
    if way != "two turns":
        return _generated(model, ids, torch.ones_like(ids), cache, **more)
    first, second = ids.tensor_split(2, 1)
    answer = _generated(model, first, torch.ones_like(first), cache)
    turn = torch.cat([first, answer, second], 1)
    return torch.cat([answer, _generated(model, turn, torch.ones_like(turn), cache)], 1)


def equal(model: Any, ids: Tensor, way: str) -> list[int]:
    """How many tokens are the same from the first one on, and how many there are."""
    stock, ours = (_written(model, ids, way, bounded) for bounded in (False, True))
    differ = (stock != ours).any(0).nonzero()
    return [int(differ[0]) if len(differ) else stock.shape[1], stock.shape[1]]


def run(options: Options, store: Store) -> dict[str, Any]:
    text = next(iter(texts_of(options).values()))
    facts, found = {}, {}
    for name in [options.model.name] if options.model else _MODELS:
        folder = options.model or source.fetch(name, options.cache or source.usual_cache())
        facts[name] = source.facts(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text[len(text) // 2 :][: 8 * _PROMPT], return_tensors="pt").input_ids
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model.to(options.device).eval()
            some = ids[:, : min(_PROMPT, model.config.max_position_embeddings // 4)]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[label] = {
                way: store.once(f"{label} {way}", equal, model, some.to(options.device), way)
                for way in _WAYS
            }
            said = ", ".join(f"{way} {x} of {y}" for way, (x, y) in found[label].items())
            say(f"{label}: {said}")
    subject = {"checkpoint": {"name": " and ".join(facts)}, "checkpoints": facts}
    return {"subject": subject, "equal": found}


def section(result: Mapping[str, Any]) -> Section:
    found = result["equal"]
    apart = [
        f"{label} with {way} from token {x + 1} on"
        for label, ways in found.items()
        for way, (x, y) in ways.items()
        if x < y
    ]
    rows = [[label, *(f"{x} of {y}" for x, y in ways.values())] for label, ways in found.items()]
    return Section(
        title="Enough states: the tokens of transformers' own cache",
        claim="A multi-state RNN with a state for every token is the transformer itself.",
        found="All tokens are the same." if not apart else f"Different: {'; '.join(apart)}.",
        comparable="Greedy decoding. Rounding may turn ties, in bfloat16 more often.",
        tables=[
            Table(
                "Tokens that are the same",
                "generate with MultiStateCache and more states than tokens, and as it is.",
                ("model", *_WAYS),
                rows,
            )
        ],
    )
