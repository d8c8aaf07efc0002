"""Long texts: books continued by 4,000 tokens, and stories until the model ends them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import msrnn_ops as ms
from bench.papers.decoder import AttendStates
from bench.papers.part import Options, Section, Store
from bench.papers.real.subject import Subject, subject
from bench.table import Table, number, say

_PROMPT, _TOKENS, _TEXTS = 256, 4000, 4
_STORY, _STORIES = 1500, 8  # most tokens of a story
_SIZES = (128, 256, 512)
_ABOUT = ("a lighthouse", "a clockmaker", "a lost letter", "two sisters")
_PART = 100  # tokens of a text between two looks at the memory


def _distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams."""
    grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    return len(grams) / (len(tokens) - n + 1)


@torch.no_grad()
def written(
    of: Subject, prompts: Tensor, number_of: int, policy: ms.Policy, end: int | None
) -> tuple[Tensor, list[int]]:
    """What the model samples after prompts (B, P), and the bytes of its state on the way.

    Where all rows have said the token ``end``, it stops. None: it is never said.
    """
    model, draw = of.model, torch.Generator(prompts.device).manual_seed(0)
    attend, found, memory = AttendStates(policy), [], []
    never = model.tokenizer.all_special_ids if end is None else []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    tokens, at = prompts, 0
    for i in range(number_of):
        logits = model.model.lm_head(model.hidden(tokens, attend, at)[:, -1]).float()
        logits[:, never] = -torch.inf
        at += tokens.shape[1]
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=draw)
        found.append(tokens)
        ended |= tokens[:, 0] == end
        if i % _PART == 0:
            memory.append(sum(state.nbytes for state in attend.states.values()))
        if ended.all():
            break
    return torch.cat(found, 1), memory


@torch.no_grad()
def continued(
    of: Subject, prompts: Tensor, length: int, policy: ms.Policy | None, own: Tensor
) -> dict[str, Any]:
    """A text of so many tokens after each prompt, and what can be said of it; None: the book's."""
    tokens, memory = own, [0]
    if policy is not None:
        tokens, memory = written(of, prompts, length, policy, None)
    losses = [
        of.model.losses(torch.cat([before, after])[None])[0, len(before) - 1 :]
        for before, after in zip(prompts, tokens, strict=True)
    ]
    texts = tokens.tolist()
    return {
        "perplexity": math.exp(float(torch.cat(losses).double().mean())),
        **{f"distinct_{n}": statistics.mean(_distinct(x, n) for x in texts) for n in (1, 2, 4)},
        "bytes": [memory[0], memory[-1]],
    }


def _story_prompts(of: Subject, number_of: int) -> Tensor:
    """One prompt for each story, of equal length, so that they make a batch."""
    asked = [
        of.model.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Write a very long story about {about}."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for about in _ABOUT
    ]
    tokens = [of.model.encode(text) for text in asked]
    longest = max(map(len, tokens))
    rows = [x for x in tokens if len(x) == longest]
    return torch.stack([rows[i % len(rows)] for i in range(number_of)])


@torch.no_grad()
def stories(of: Subject, number_of: int, most: int, policy: ms.Policy) -> list[int]:
    """The tokens of each story before the one that ends it."""
    end = of.model.tokenizer.eos_token_id
    tokens, _ = written(of, _story_prompts(of, number_of), most, policy, end)
    lengths = []
    for row in tokens.tolist():
        lengths.append(row.index(end) if end in row else len(row))
    return lengths


def run(options: Options, store: Store) -> dict[str, Any]:
    prompt, length, texts, most, number_of = _PROMPT, _TOKENS, _TEXTS, _STORY, _STORIES
    sizes: Sequence[int] = _SIZES
    if options.quick:
        prompt, length, texts, most, number_of, sizes = 64, 64, 2, 32, 2, (16,)
    of = subject("smollm2", options, torch.bfloat16)
    length = of.fitting(prompt + length) - prompt
    rows = of.excerpts(prompt + length - 1, texts).rows
    prompts, own = rows[:, :prompt], rows[:, prompt:]
    policies: dict[str, ms.Policy | None] = {
        "the book itself": None,
        "full state": ms.Policy.window(prompt + length),
        **{f"TOVA-layer {slots}": ms.Policy.tova(slots) for slots in sizes},
    }
    found, told = {}, {}
    for name, policy in policies.items():
        found[name] = store.once(name, continued, of, prompts, length, policy, own)
        say(f"{name}: perplexity under the full state {found[name]['perplexity']:.2f}")
        if policy is not None and of.model.tokenizer.chat_template:
            told[name] = store.once(f"stories, {name}", stories, of, number_of, most, policy)
            say(f"{name}: stories of {statistics.mean(told[name]):.0f} tokens")
    return {
        "subject": of.facts,
        "prompt": prompt,
        "tokens": length,
        "continued": found,
        "most": most,
        "stories": told,
    }


def _continued_table(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in result["continued"].items():
        first, last = (x / 2**20 for x in one["bytes"])
        rows.append(
            [
                name,
                number(one["perplexity"], 4),
                *(f"{one[f'distinct_{n}']:.2f}" for n in (1, 2, 4)),
                f"{first:.1f}, {last:.1f} MiB" if last else "",
            ]
        )
    return Table(
        f"Books continued by {result['tokens']:,} tokens",
        f"Sampled at temperature 1 after {result['prompt']} tokens of a book: perplexity under the "
        "full state, different n-grams over all n-grams, and the memory of the states after the "
        "first and the last token.",
        ("", "perplexity", "distinct-1", "distinct-2", "distinct-4", "states"),
        rows,
    )


def _story_table(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{statistics.mean(lengths):.0f}",
            f"{min(lengths)} to {max(lengths)}",
            f"{sum(x == result['most'] for x in lengths)} of {len(lengths)}",
        ]
        for name, lengths in result["stories"].items()
    ]
    return Table(
        "Stories",
        f"Tokens until the model ends a story, or {result['most']:,}.",
        ("", "mean", "range", "not ended"),
        rows,
    )


def section(result: Mapping[str, Any]) -> Section:
    found = result["continued"]
    bounded = {name: one for name, one in found.items() if name.startswith("TOVA")}
    said = ", ".join(f"{name} {one['perplexity']:.2f}" for name, one in found.items())
    flat = all(one["bytes"][0] == one["bytes"][1] for one in bounded.values())
    return Section(
        title="Writing with a bounded state",
        claim=(
            "Stories written with an eighth of the states are as long, and judged as good, as the "
            "full model's; smaller states write longer ones."
        ),
        found=(
            f"Perplexity of what was written under the full state: {said}. The memory of a bounded "
            f"state {'stays what it was' if flat else 'grew'}."
        ),
        comparable=(
            "The paper asks GPT-4 which of two stories is better; likelihood under the full state "
            "stands in for it here, and favours what is repetitive."
        ),
        tables=[_continued_table(result)] + ([_story_table(result)] if result["stories"] else []),
    )
