"""Looking things up far back: a pass key in a text, one of four keys, a fact of an earlier turn.

A prompt that ends with the question is read once with full attention, and its states are reduced at
once; so the first token of the answer has seen everything, and the others what a policy kept. In a
chat each turn is reduced before the next one is known: nothing has asked for the fact by then.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

import msrnn_ops as ms
from bench.papers.checkpoint import Checkpoint
from bench.papers.decoder import AttendStates
from bench.papers.part import Options, Plot, Section, Store
from bench.papers.real.perplexity import POLICIES
from bench.papers.real.prompt import Read, read, reduced
from bench.papers.real.subject import Subject, subject
from bench.table import Table, say

_POLICIES = ("TOVA-layer", "H2O-layer", "Window+4")
LENGTHS = (1024, 2048, 4096, 8192)
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TRIALS = 20  # of a length, in turn at each depth
_SHARES = (2, 4, 8, 16)  # the state is such a part of the prompt
# H2O sums the attention of all queries, which takes most of the time of long prompts: two sizes are
# enough, and none of the longest.
_STATES = [
    (name, share)
    for name in _POLICIES
    for share in _SHARES
    if name != "H2O-layer" or share in (8, 4)
]
_LONGEST_OF_H2O = 4096
# A chat is read anew for each of them. A smaller state keeps no more than these do.
_CHAT_STATES = [(name, share) for name, share in _STATES if share <= 4]
_COLOURS = ("red", "green", "blue", "white")
_CHAT_TURNS, _CHAT_CHARACTERS = 4, 1000
_TASKS = {"one": "one pass key", "four": "one of four"}


@dataclass(frozen=True)
class Question:
    """A prompt with its question, and the tokens that answer it."""

    tokens: Tensor  # (T,), with the token that begins a text
    answer: Sequence[int]


def _continued(model: Checkpoint, text: str, answer: str) -> list[int]:
    """The tokens of an answer as it stands behind a text."""
    before, both = model.encode(text).tolist(), model.encode(text + answer).tolist()
    assert both[: len(before)] == before, "an answer that changes the tokens before it"
    return both[len(before) :]


def question(of: Subject, task: str, length: int, depth: float, trial: int) -> Question:
    """A pass key of five digits in the texts, at this depth; for "four", among three others."""
    model, draw = of.model, random.Random(f"{task} {length} {depth} {trial}")
    keys = [f"{draw.randrange(10_000, 100_000)}" for _ in _COLOURS]
    first = "Some text follows, and a pass key is hidden in it. Remember the pass key.\n\n"
    if task == "one":
        told = [(depth, f"\n\nThe pass key is {keys[0]}. Remember it: {keys[0]}.\n\n")]
        asked = "\n\nThe text is over. What was the pass key? The pass key was"
    else:
        places = sorted(draw.sample([x for x in _DEPTHS if x != depth], 3))
        which = draw.randrange(4)
        colours = [_COLOURS[which], *(x for x in _COLOURS if x != _COLOURS[which])]
        told = [
            (place, f"\n\nThe pass key of the {colour} door is {key}.\n\n")
            for place, colour, key in zip((depth, *places), colours, keys, strict=True)
        ]
        asked = (
            "\n\nThe text is over. What was the pass key of the "
            f"{colours[0]} door? The pass key of the {colours[0]} door was"
        )
    parts = {place: model.encode(sentence) for place, sentence in told}
    begin, end = model.encode(first), model.encode(asked)
    start = [] if model.start_token is None else [torch.tensor([model.start_token])]
    room = length - len(begin) - len(end) - len(start) - sum(map(len, parts.values()))
    text = model.encode(draw.choice(list(of.texts.values())))
    at = draw.randrange(max(1, len(text) - room))
    filler = text[at : at + room]
    pieces, before = [*start, begin], 0
    for place in sorted(parts):
        until = int(place * room)
        pieces += [filler[before:until], parts[place]]
        before = until
    pieces += [filler[before:], end]
    return Question(torch.cat(pieces), _continued(model, asked, f" {keys[0]}"))


@torch.no_grad()
def answered(model: Checkpoint, prompt: Read, first: Tensor, of: Question, policy: Any) -> int:
    """How many tokens of the answer are right, before one is wrong; None: the full state."""
    slots = len(of.tokens) + len(of.answer)
    attend: AttendStates = reduced(prompt, policy or ms.Policy.window(slots))
    token = int(first.argmax())
    for i, right in enumerate(of.answer):
        if token != right:
            return i
        if i + 1 < len(of.answer):
            here = torch.tensor([[token]], device=of.tokens.device)
            token = int(model(here, attend, len(of.tokens) + i)[0, -1].argmax())
    return len(of.answer)


@torch.no_grad()
def trial(of: Subject, task: str, length: int, number: int) -> dict[str, Any]:
    """One question, asked of all policies with all sizes of the state."""
    depth = _DEPTHS[number % len(_DEPTHS)]
    asked = question(of, task, length, depth, number)
    kept, logits = read(of.model, asked.tokens[None])
    ask = partial(answered, of.model, kept, logits, asked)
    right = {"full": ask(None)}
    for name, share in _STATES:
        if name != "H2O-layer" or length <= _LONGEST_OF_H2O:
            right[f"{name} 1/{share}"] = ask(POLICIES[name](length // share))
    return {"depth": depth, "digits": len(asked.answer), "right": right}


def turns(of: Subject, number: int) -> tuple[list[Tensor], list[int]]:
    """A chat: the tokens of each turn, the last of which asks for a code told in the first."""
    draw, code = random.Random(number), f"{random.Random(number).randrange(10_000, 100_000)}"
    said = [f"Hello. Please remember this for me: my locker code is {code}.", "I will remember it."]
    for _ in range(_CHAT_TURNS):
        text = draw.choice(list(of.texts.values()))
        at = draw.randrange(max(1, len(text) - _CHAT_CHARACTERS))
        said += [
            f"What do you make of this?\n\n{text[at : at + _CHAT_CHARACTERS]}",
            "It is lively.",
        ]
    said += ["Thank you. And what was my locker code?"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
    ]
    spell = partial(of.model.tokenizer.apply_chat_template, tokenize=False)
    pieces, before = [], ""
    for i in range(0, len(messages), 2):  # a turn of the user, behind what was answered before
        whole: str = spell(messages[: i + 1], add_generation_prompt=True)
        assert whole.startswith(before)
        pieces.append(whole[len(before) :])
        before = whole
    pieces[-1] += "Your locker code is"
    tokens = [of.model.encode(piece) for piece in pieces]
    return tokens, _continued(of.model, pieces[-1], f" {code}")


@torch.no_grad()
def chat(of: Subject, number: int) -> dict[str, Any]:
    """Each turn is a prompt of its own, reduced before the next one comes."""
    prompts, answer = turns(of, number)
    length = sum(map(len, prompts))
    policies = {"full": ms.Policy.window(length + len(answer))}
    for name, share in _CHAT_STATES:
        policies[f"{name} 1/{share}"] = POLICIES[name](length // share)
    right = {}
    for name, policy in policies.items():
        attend, at = AttendStates(policy), 0
        for prompt in prompts:
            logits = of.model.hidden(prompt[None], attend, at)[:, -1:]
            at += len(prompt)
        token, right[name] = int(of.model.model.lm_head(logits)[0, -1].argmax()), 0
        for wanted in answer:
            if token != wanted:
                break
            right[name] += 1
            here = torch.tensor([[token]], device=prompts[0].device)
            token = int(of.model(here, attend, at)[0, -1].argmax())
            at += 1
    return {"tokens": length, "digits": len(answer), "right": right}


def measure(
    tasks: Sequence[str], lengths: Sequence[int], chatting: bool, options: Options, store: Store
) -> dict[str, Any]:
    trials = chat_trials = _TRIALS
    if options.quick:
        lengths, trials, chat_trials = (512,), 2, 1
    of = subject("smollm2", options, torch.bfloat16)
    if of.model.context < lengths[0]:
        raise SystemExit(
            f"python -m bench papers: expected a model for {lengths[0]:,} tokens or more, got one "
            f"for {of.model.context:,}"
        )
    found: dict[str, dict[str, list[Any]]] = {}
    for task in tasks:
        for length in (x for x in lengths if x <= of.model.context):
            pieces = [
                store.once(f"{task} {length} {number}", trial, of, task, length, number)
                for number in range(trials)
            ]
            found.setdefault(task, {})[str(length)] = pieces
            say(f"{_TASKS[task]}, {length:,} tokens: {_shares_of(pieces)}")
    chats = []
    if chatting and of.model.tokenizer.chat_template:
        chats = [store.once(f"chat {number}", chat, of, number) for number in range(chat_trials)]
        say(f"chats: {_shares_of(chats, 4)}")
    return {"subject": of.facts, "tasks": found, "chats": chats}


run = partial(measure, ("one",), LENGTHS, True)


def _share(pieces: Sequence[Mapping[str, Any]], name: str) -> float:
    """Of the answers, those right to the last token; NaN where none was asked for."""
    if name not in pieces[0]["right"]:
        return math.nan
    return sum(one["right"][name] == one["digits"] for one in pieces) / len(pieces)


def _shares_of(pieces: Sequence[Mapping[str, Any]], share: int = 8) -> str:
    names = ("full", *(f"{name} 1/{share}" for name in _POLICIES))
    shares = {name: _share(pieces, name) for name in names}
    return ", ".join(f"{name} {x:.0%}" for name, x in shares.items() if not math.isnan(x))


def _table(title: str, note: str, columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    names = next(iter(columns.values()))[0]["right"]
    rows = []
    for name in names:
        shares = [_share(one, name) for one in columns.values()]
        rows.append([name, *("" if math.isnan(x) else f"{x:.0%}" for x in shares)])
    return Table(title, note, ("state", *columns), rows)


def _draw(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for (task, lengths), one in zip(result["tasks"].items(), axes, strict=True):
        ticks = range(len(lengths))
        whole = [_share(pieces, "full") for pieces in lengths.values()]
        one.plot(ticks, whole, "-.", color="#222", label="full state")
        for name in _POLICIES:
            for share, style in ((8, "-"), (4, "--")):
                shares = [_share(pieces, f"{name} 1/{share}") for pieces in lengths.values()]
                one.plot(ticks, shares, style, marker="o", label=f"{name} 1/{share}")
        one.set_xticks(ticks, [f"{int(length):,}" for length in lengths])
        one.set_title(_TASKS[task])
        one.set_xlabel("tokens of the prompt")
        one.set_ylabel("right answers")
        one.set_ylim(-0.03, 1.03)
    axes[-1].legend(frameon=False, fontsize=9)


def section(result: Mapping[str, Any]) -> Section:
    said = []
    for task, lengths in result["tasks"].items():
        for length, pieces in lengths.items():
            said.append(f"{_TASKS[task]}, {int(length):,} tokens: {_shares_of(pieces)}")
    chats = result["chats"]
    if chats:
        said.append(f"chats of {min(x['tokens'] for x in chats):,} tokens or more: "
                    f"{_shares_of(chats, 4)}")  # fmt: skip
    tables = [
        _table(
            f"Right answers: {_TASKS[task]}",
            f"Of {len(next(iter(lengths.values())))} questions for each length of "
            "the prompt, at five depths; the state is a part of the prompt.",
            {f"{int(x):,}": pieces for x, pieces in lengths.items()},
        )
        for task, lengths in result["tasks"].items()
    ]
    if chats:
        note = f"{_CHAT_TURNS} turns about other things come between a code and the question."
        tables.append(_table("Right answers: a fact of a chat", note, {"right": chats}))
    return Section(
        title=f"Looking things up far back: {' and '.join(_TASKS[x] for x in result['tasks'])}",
        claim=(
            "In long-range question answering TOVA with an eighth to a quarter of the states is "
            "within a few points of the full model, and ahead of windows."
        ),
        found="; ".join(said) + ".",
        comparable=(
            "The paper's tasks are SQuALITY and QASPER, read by tuned models of 7 billion "
            "parameters; these are simpler, for a model of 135 million."
        ),
        tables=tables,
        plots=[
            Plot(
                "lengths",
                "Pass keys found, by the length of the prompt.",
                partial(_draw, result),
                columns=len(result["tasks"]),
            )
        ],
    )
