"""Finite transformers: a decoder whose state is bounded to N, under the policies of the paper.

A small decoder learns a text (or a checkpoint is loaded) with full attention; everything after that
only changes what its attention keeps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

import msrnn_ops as ms
from bench.measure import interleaved
from bench.papers import recall, words
from bench.papers.decoder import (
    Attend,
    AttendSequence,
    AttendStates,
    Decoder,
    LanguageModel,
    Training,
    attend_all,
    train,
)
from bench.papers.part import Options, Store
from bench.papers.states_report import section as section

POLICIES: dict[str, Callable[[int], ms.Policy]] = {
    "Window": ms.Policy.window,
    "Window+1": partial(ms.Policy.window_sinks, sinks=1),
    "Window+4": partial(ms.Policy.window_sinks, sinks=4),
    "H2O-head": partial(ms.Policy.h2o, scope="head"),
    "H2O-layer": ms.Policy.h2o,
    "TOVA-head": partial(ms.Policy.tova, scope="head"),
    "TOVA-layer": ms.Policy.tova,
    "TOVA-layer+4": partial(ms.Policy.tova, sinks=4),
}
_SHARES = (8, 4, 2, 1)  # the state is one such part of the context
_ROWS_OF_ATTENTION = 8  # windows whose attention weights are looked at


@dataclass(frozen=True)
class Speed:
    """A decoder with untrained weights, of which only the time counts."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    rows: int  # of the full state, which make the budget
    seconds: float


@dataclass(frozen=True)
class Scale:
    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    training: Training
    batch: int
    copies: int  # rows of a batch that are shuffled text, repeated: they teach to look far back
    states: Sequence[int]
    windows: int  # of held-out text, one context each
    prompt: int  # tokens that are continued
    texts: int
    recall: recall.Task
    speed: Speed


QUICK = Scale(
    vocabulary=512,
    width=128,
    layers=3,
    heads=8,
    context=256,
    training=Training(steps=800, rate=2e-3, warmup=30),
    batch=4,
    copies=1,
    states=(16, 32, 64, 128),
    windows=32,
    prompt=32,
    texts=8,
    recall=recall.QUICK,
    speed=Speed(1024, 256, 4, 8, 4096, 2, 1.0),
)
FULL = Scale(
    vocabulary=16_384,
    width=1024,
    layers=16,
    heads=16,
    context=4096,
    training=Training(steps=20_000, rate=6e-4, warmup=500),
    batch=16,
    copies=0,
    states=(16, 32, 64, 128, 256, 512, 1024, 2048),
    windows=64,
    prompt=512,
    texts=32,
    recall=recall.FULL,
    speed=Speed(32_000, 4096, 32, 32, 4096, 8, 5.0),
)


@dataclass(frozen=True)
class Subject:
    """A model, and held-out text for it: (rows, context + 1) tokens, the first one the start."""

    model: LanguageModel
    windows: Tensor
    spell: Callable[[int], str]
    facts: dict[str, Any]


def _windows(held_out: Tensor, context: int, most: int, start: int | None) -> Tensor:
    """Windows spread over the text, each after the token that starts a text."""
    length = context if start is not None else context + 1
    found = held_out.unfold(0, length, length)
    rows = found[torch.linspace(0, len(found) - 1, min(most, len(found))).long()]
    return rows if start is None else torch.cat([torch.full((len(rows), 1), start), rows], 1)


def _trained(options: Options, scale: Scale, store: Store) -> Subject:
    corpus = words.corpus(options.text, scale.vocabulary)
    torch.manual_seed(0)
    model = Decoder(len(corpus.vocabulary), scale.width, scale.layers, scale.heads)
    model.to(options.device)
    length = scale.context

    def lesson(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        first = torch.randint(len(corpus.train) - length + 1, (scale.batch,), generator=generator)
        rows = torch.stack([corpus.train[i : i + length] for i in first.tolist()])
        targets = rows.clone()
        for row, target in zip(rows[: scale.copies], targets, strict=False):
            period = int(torch.randint(4, length // 2 + 1, (), generator=generator))
            shuffled = row[:period][torch.randperm(period, generator=generator)]
            row[:] = shuffled.repeat(length // period + 1)[:length]
            target[period:] = row[period:]
            target[:period] = -100
        rows, targets = rows.to(options.device), targets.to(options.device)
        return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1), targets

    losses = train(model, lesson, scale.training, "decoder", store)
    facts = {
        "name": f"a decoder of {scale.layers} layers and width {scale.width}",
        "text": corpus.name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "trained_on": scale.training.steps * scale.batch * length,
        "losses": losses,
    }
    windows = _windows(corpus.held_out, length, scale.windows, 0).to(options.device)
    return Subject(model, windows, corpus.vocabulary.__getitem__, facts)


def _loaded(path: Path, dataset: Path, device: str, scale: Scale) -> Subject:
    from bench.papers.checkpoint import Checkpoint

    model = Checkpoint(path, device)
    held_out = model.encode(dataset.read_text(encoding="utf-8"))
    context = min(scale.context, model.context)
    windows = _windows(held_out, context, scale.windows, model.start_token).to(device)
    facts = {
        "name": path.name,
        "text": dataset.name,
        "parameters": model.parameters,
        "vocabulary": model.vocabulary,
        "trained_on": None,
        "losses": [],
    }
    return Subject(model, windows, model.spell, facts)


@torch.no_grad()
def _perplexity(subject: Subject, batch: int, attend: Callable[[], Attend]) -> float:
    total = 0.0
    for rows in subject.windows.split(batch):
        logits = subject.model(rows[:, :-1], attend()).float()
        total += float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / subject.windows[:, 1:].numel())


class _Forgotten:
    """Full attention; `shares` has of every layer what part of it is paid to dropped states."""

    def __init__(self, policy: ms.Policy) -> None:
        self.policy = policy
        self.shares: list[float] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, expiry = ms.attend_sequence(q, k, v, self.policy)
        heads, time = q.shape[1], q.shape[2]
        logits = q @ k.repeat_interleave(heads // k.shape[1], 1).mT * q.shape[-1] ** -0.5
        step = torch.arange(time, device=q.device)[:, None]
        weights = logits.float().masked_fill(step < step.T, -torch.inf).softmax(-1)
        gone = step >= expiry.repeat_interleave(heads // expiry.shape[1], 1)[:, :, None]
        self.shares.append(float((weights * gone).sum(-1).mean()))
        return attend_all(layer, q, k, v)


@torch.no_grad()
def _forgotten(subject: Subject, slots: int) -> dict[str, float]:
    """What share of the full model's attention is paid to states that each policy has dropped."""
    found = {}
    for name, policy in POLICIES.items():
        shares: list[float] = []
        for row in subject.windows[:_ROWS_OF_ATTENTION, :-1]:
            attend = _Forgotten(policy(slots))
            subject.model(row[None], attend)
            shares += attend.shares
        found[name] = sum(shares) / len(shares)
    return found


@torch.no_grad()
def _kept(subject: Subject, policy: ms.Policy) -> dict[str, Any]:
    """What stays in the last layer: expiry of a window, and how long kinds of tokens stay."""
    rows = subject.windows[:, :-1]
    time = rows.shape[1]
    stays: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        attend = AttendSequence(policy)
        subject.model(row[None], attend)
        expiry = attend.expiry[-1][0, 0].tolist()
        for position, token in enumerate(row[: time // 2].tolist()):
            kind = words.kind_of(subject.spell(token) if position else "")
            stays[kind].append((expiry[position] - position) / (time - position))
    share = {kind: [sum(x) / len(x), len(x)] for kind, x in stays.items()}
    return {"slots": policy.slots, "expiry": expiry, "stays": share}


def _distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


@torch.no_grad()
def _judged(subject: Subject, tokens: Tensor, prompt: int) -> dict[str, float]:
    """Figures of texts (rows, T) that begin with prompts; their perplexity under the full model."""
    written = tokens[:, prompt:]
    paragraphs = sum("\n\n" in subject.spell(token) for token in written.flatten().tolist())
    logits = subject.model(tokens[:, :-1])[:, prompt - 1 :].float()
    loss = cross_entropy(logits.flatten(0, 1), written.flatten())
    return {
        "tokens": written.shape[1],
        "tokens_a_paragraph": written.numel() / (paragraphs + len(written)),
        "distinct_1": sum(_distinct(row, 1) for row in written.tolist()) / len(written),
        "distinct_2": sum(_distinct(row, 2) for row in written.tolist()) / len(written),
        "distinct_4": sum(_distinct(row, 4) for row in written.tolist()) / len(written),
        "perplexity": math.exp(float(loss)),
    }


@torch.no_grad()
def _written(subject: Subject, prompts: Tensor, length: int, policy: ms.Policy) -> Tensor:
    """Prompts and what the model writes after them, sampled, up to `length` tokens."""
    generator = torch.Generator(prompts.device).manual_seed(0)
    attend = AttendStates(policy)
    tokens = prompts
    logits = subject.model(prompts, attend)
    for start in track(range(prompts.shape[1], length), f"writing, {policy.slots} states"):
        token = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, token], 1)
        logits = subject.model(token, attend, start)
    return tokens


def _writing(subject: Subject, scale: Scale) -> dict[str, Any]:
    texts = subject.windows[: scale.texts, :-1]
    context = texts.shape[1]
    prompt = min(scale.prompt, context // 8)
    found = {"the text itself": _judged(subject, texts, prompt)}
    samples = {}
    for share in _SHARES:
        policy = ms.Policy.tova(context // share)
        tokens = _written(subject, texts[:, :prompt], context, policy)
        name = str(policy.slots)
        found[name] = _judged(subject, tokens, prompt)
        samples[name] = "".join(map(subject.spell, tokens[0, prompt:].tolist()))
    return {"prompt": prompt, "texts": len(texts), "judged": found, "samples": samples}


def _step(model: LanguageModel, token: Tensor, attend: Attend, start: int) -> None:
    model(token, attend, start)
    if token.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def _speed(
    model: LanguageModel, vocabulary: int, context: int, device: str, speed: Speed
) -> list[dict[str, Any]]:
    """Tokens a second at the largest batch whose states fit what the full state of rows takes."""

    def filled(slots: int, rows: int) -> AttendStates:
        policy = ms.Policy.window(slots) if slots == context else ms.Policy.tova(slots)
        attend = AttendStates(policy)
        model(torch.randint(vocabulary, (rows, slots), device=device), attend)
        return attend

    def size(attend: AttendStates) -> int:
        return sum(state.nbytes for state in attend.states.values())

    budget = speed.rows * size(filled(context, 1))
    rows = []
    for share in track(_SHARES, "speed"):
        slots = context // share
        batch = budget // size(filled(slots, 1))
        attend = filled(slots, batch)
        token = torch.randint(vocabulary, (batch, 1), device=device)

        step = partial(_step, model, token, attend, context)
        step()
        timing = interleaved({"step": step}, speed.seconds)["step"]
        rows.append(
            {"slots": slots, "batch": batch, "bytes": size(attend), "step": timing}
            | {"tokens_per_second": batch / timing["median"]}
        )
    return rows


def run(options: Options, store: Store, scale: Scale | None = None) -> dict[str, Any]:
    scale = scale or (FULL if options.full else QUICK)
    device = options.device
    if options.model is not None and options.dataset is not None:
        subject = _loaded(options.model, options.dataset, device, scale)
    else:
        subject = _trained(options, scale, store)
    context = subject.windows.shape[1] - 1
    sizes = sorted({*(n for n in scale.states if n < context), context // 8})

    def perplexity(attend: Callable[[], Attend]) -> float:
        return _perplexity(subject, scale.batch, attend)

    full = store.once("perplexity full", perplexity, lambda: attend_all)
    found: dict[str, dict[str, float]] = {}
    for name, policy in track(POLICIES.items(), "perplexity, policies"):
        for slots in sizes:
            sequence = partial(AttendSequence, policy(slots))
            key = f"perplexity {name} {slots}"
            found.setdefault(name, {})[str(slots)] = store.once(key, perplexity, sequence)
    result = {
        "subject": {**subject.facts, "context": context, "windows": len(subject.windows)},
        "perplexity": {"full": full, "states": sizes, "policies": found},
        "forgotten": store.once("forgotten", _forgotten, subject, context // 8),
        "kept": store.once("kept", _kept, subject, ms.Policy.tova(context // 8)),
        "writing": store.once("writing", _writing, subject, scale),
        "recall": store.once("recall", recall.run, scale.recall, POLICIES, device, store),
    }
    speed = scale.speed
    if options.model is None:
        with torch.device(device):
            fast = Decoder(speed.vocabulary, speed.width, speed.layers, speed.heads)
        fast.to(torch.bfloat16 if device == "cuda" else torch.float32)
        model: LanguageModel = fast
        vocabulary, length = speed.vocabulary, speed.context
    else:
        model, vocabulary, length = subject.model, int(subject.facts["vocabulary"]), context
    measured = store.once("speed", _speed, model, vocabulary, length, device, speed)
    return {**result, "speed": measured}
