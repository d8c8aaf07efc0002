"""With a state for every token, generate writes what it writes with transformers' own cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import msrnn_ops as ms
from bench.papers.checkpoint import CACHE
from bench.papers.part import Options, Section, Store
from bench.papers.real import source
from bench.papers.real.subject import texts_of
from bench.table import Table, say
from msrnn_ops.transformers import MultiStateCache

_PROMPT, _NEW = 300, 24
_MODELS = ("smollm2", "gemma3")
_WAYS = ("one prompt", "left-padded", "three beams", "a prompt in chunks", "two turns")


@dataclass(frozen=True)
class _Written:
    """What one call of generate was given, and the tokens that it wrote."""

    ids: Tensor
    mask: Tensor
    new: Tensor


def _generated(
    model: Any, ids: Tensor, mask: Tensor, cache: MultiStateCache | None, **more: Any
) -> _Written:
    model.set_attn_implementation("sdpa" if cache is None else "msrnn")
    if cache is not None:
        more[CACHE] = cache
    settings = {"do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, eos_token_id=None, **settings, **more)
    return _Written(ids, mask, found[:, ids.shape[1] :])


def _written(model: Any, ids: Tensor, way: str, bounded: bool, new: int) -> list[_Written]:
    cache = MultiStateCache(ms.Policy.tova(4 * _PROMPT), model.config) if bounded else None
    if way == "left-padded":
        short = ids.shape[1] // 5
        rows, mask = ids.repeat(2, 1), torch.ones_like(ids).repeat(2, 1)
        rows[1, :-short], mask[1, :-short] = 0, 0
        return [_generated(model, rows, mask, cache, max_new_tokens=new)]
    more = {"max_new_tokens": new, **({"num_beams": 3} if way == "three beams" else {})}
    if way == "a prompt in chunks" and bounded:
        more["prefill_chunk_size"] = 64
    if way != "two turns":
        return [_generated(model, ids, torch.ones_like(ids), cache, **more)]
    first, second = ids.tensor_split(2, 1)
    answer = _generated(model, first, torch.ones_like(first), cache, **more)
    turn = torch.cat([first, answer.new, second], 1)
    return [answer, _generated(model, turn, torch.ones_like(turn), cache, **more)]


@torch.no_grad()
def _tie(model: Any, stock: _Written, row: int, same: int, other: int) -> float:
    """How far the logit of transformers' token is above that of ours, in steps of bfloat16."""
    real = stock.ids[row][stock.mask[row] > 0]
    model.set_attn_implementation("sdpa")
    logits = model(torch.cat([real, stock.new[row, :same]])[None]).logits[0, -1].float()
    best = float(logits[stock.new[row, same]])
    return (best - float(logits[other])) / 2.0 ** (math.floor(math.log2(abs(best))) - 7)


@torch.no_grad()
def _beams_apart(model: Any, stock: _Written, ours: _Written) -> float:
    """How far transformers' text is more likely than ours, in steps of bfloat16 of a logit."""
    model.set_attn_implementation("sdpa")
    sums, largest = [], 0.0
    for one in (stock, ours):
        logits = model(torch.cat([one.ids, one.new], 1)).logits[0, one.ids.shape[1] - 1 : -1]
        chosen = one.new[0, :, None]
        sums.append(float(logits.double().log_softmax(-1).gather(-1, chosen).sum()))
        largest = max(largest, float(logits.gather(-1, chosen).abs().max()))
    return (sums[0] - sums[1]) / 2.0 ** (math.floor(math.log2(largest)) - 7)


def equal(model: Any, ids: Tensor, way: str, new: int) -> dict[str, Any]:
    """How many tokens are the same up to the first that is not, and how near a tie that one is."""
    stock, ours = (_written(model, ids, way, bounded, new) for bounded in (False, True))
    same, tie = 0, None
    for x, y in zip(stock, ours, strict=True):
        differ = (x.new != y.new).nonzero()
        if len(differ):
            row, at = min(differ.tolist(), key=lambda place: place[1])
            same += at
            if way == "three beams":  # whose sums of many tokens are compared
                tie = _beams_apart(model, x, y)
            else:
                tie = _tie(model, x, row, at, int(y.new[row, at]))
            break
        same += x.new.shape[1]
    return {"same": same, "of": sum(x.new.shape[1] for x in stock), "tie": tie}


def run(options: Options, store: Store) -> dict[str, Any]:
    text = next(iter(texts_of(options).values()))
    new = 8 if options.quick else _NEW
    facts, found = {}, {}
    for name in [options.model.name] if options.model else _MODELS:
        folder = options.model or source.fetch(name, options.cache or source.usual_cache())
        facts[name] = source.facts(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text[len(text) // 2 :][: 8 * _PROMPT], return_tensors="pt").input_ids
        for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model.to(options.device).eval()
            some = ids[:, : min(_PROMPT, model.config.max_position_embeddings // 4)]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[label] = {
                way: store.once(f"{label} {way}", equal, model, some.to(options.device), way, new)
                for way in _WAYS
            }
            said = ", ".join(f"{way} {_cell(one)}" for way, one in found[label].items())
            say(f"{label}: {said}")
    subject = {"checkpoint": {"name": " and ".join(facts)}, "checkpoints": facts}
    return {"subject": subject, "equal": found}


def _cell(one: Mapping[str, Any]) -> str:
    tie = "" if one["tie"] is None else f" ({one['tie']:.1f})"
    return f"{one['same']} of {one['of']}{tie}"


def section(result: Mapping[str, Any]) -> Section:
    found = result["equal"]
    cells = [one for ways in found.values() for one in ways.values()]
    whole = sum(one["same"] == one["of"] for one in cells)
    ties = [one["tie"] for one in cells if one["tie"] is not None]
    said = f"{whole} of {len(cells)} texts are the same to the end."
    if ties:
        said += (
            " Where others first differ, the two tokens, or the two sums of beams, are a near-tie: "
            f"without a cache at most {max(map(abs, ties)):.1f} steps of bfloat16 apart."
        )
    rows = [[label, *map(_cell, ways.values())] for label, ways in found.items()]
    return Section(
        title="Enough states: the tokens of transformers' own cache",
        claim="A multi-state RNN with a state for every token is the transformer itself.",
        found=said,
        comparable="Greedy decoding. Rounding may turn ties, in bfloat16 more often.",
        tables=[
            Table(
                "Tokens that are the same",
                "generate with MultiStateCache and more states than tokens, and as it is. In "
                "brackets the distance of the two logits where they first differ, or of two beams’ "
                "sums, in steps of bfloat16.",
                ("model", *_WAYS),
                rows,
            )
        ],
    )
