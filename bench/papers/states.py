"""Finite transformers: a decoder whose state is bounded to N, under the policies of the paper.

A small decoder learns a text (or a checkpoint is loaded) with full attention; everything after that
only changes what its attention keeps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
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
from bench.papers.part import Options, Plot, Section, Store
from bench.table import Table, number

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
    states: Sequence[int]
    windows: int  # of held-out text, one context each
    prompt: int  # tokens that are continued
    texts: int
    recall: recall.Task
    speed: Speed


QUICK = Scale(
    vocabulary=1024,
    width=128,
    layers=3,
    heads=4,
    context=512,
    training=Training(steps=300, rate=3e-3, warmup=30),
    batch=4,
    states=(16, 32, 64, 128, 256),
    windows=16,
    prompt=64,
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
    corpus = words.corpus(options.texts, scale.vocabulary)
    torch.manual_seed(0)
    model = Decoder(len(corpus.vocabulary), scale.width, scale.layers, scale.heads)
    model.to(options.device)
    length = scale.context

    def lesson(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        first = torch.randint(len(corpus.train) - length + 1, (scale.batch,), generator=generator)
        rows = torch.stack([corpus.train[i : i + length] for i in first.tolist()])
        rows = rows.to(options.device)
        return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1), rows

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
    for start in track(range(prompts.shape[1], length), f"{policy.slots} states"):
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

    full = store.once("perplexity full", lambda: perplexity(lambda: attend_all))
    found: dict[str, dict[str, float]] = {}
    for name, policy in track(POLICIES.items(), "perplexity, policies"):
        for slots in sizes:
            sequence = partial(AttendSequence, policy(slots))
            key = f"perplexity {name} {slots}"
            found.setdefault(name, {})[str(slots)] = store.once(key, partial(perplexity, sequence))
    result = {
        "subject": {**subject.facts, "context": context, "windows": len(subject.windows)},
        "perplexity": {"full": full, "states": sizes, "policies": found},
        "kept": store.once("kept", lambda: _kept(subject, ms.Policy.tova(context // 8))),
        "writing": store.once("writing", lambda: _writing(subject, scale)),
        "recall": store.once("recall", lambda: recall.run(scale.recall, POLICIES, device, store)),
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
    measured = store.once("speed", lambda: _speed(model, vocabulary, length, device, speed))
    return {**result, "speed": measured}


def _eighth(result: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """An eighth of the context, and the perplexity of every policy there."""
    slots = str(result["subject"]["context"] // 8)
    policies = result["perplexity"]["policies"]
    return slots, {name: at[slots] for name, at in policies.items()}


def _verdict(result: Mapping[str, Any]) -> str:
    """Whether TOVA-layer is the best of what the paper compares it to, at an eighth."""
    slots, at = _eighth(result)
    full, tova = result["perplexity"]["full"], at["TOVA-layer"]
    rivals = ("Window+4", "H2O-head", "H2O-layer")
    better = [name for name in rivals if at[name] < tova]
    said = (
        f"With {slots} of {result['subject']['context']} states TOVA-layer has perplexity "
        f"{tova:.2f}, the full state {full:.2f}, Window {at['Window']:.2f}, Window+4 "
        f"{at['Window+4']:.2f}, H2O-head {at['H2O-head']:.2f} and H2O-layer {at['H2O-layer']:.2f}: "
    )
    if not better:
        return said + "as in the paper, none of them is better than TOVA-layer."
    gap = max(tova / at[name] - 1 for name in better)
    return (
        said + f"unlike in the paper, {' and '.join(better)} did better, by {gap:.1%} at most, "
        f"where forgetting all but the last {slots} tokens costs {at['Window'] / full - 1:.1%}: "
        "so much, or little, is all that this model takes from far behind."
    )


def _perplexity_table(result: Mapping[str, Any]) -> Table:
    found, subject = result["perplexity"], result["subject"]
    sizes = found["states"]
    rows = [
        [name, *(number(at[str(slots)], 4) for slots in sizes), number(found["full"], 4)]
        for name, at in found["policies"].items()
    ]
    return Table(
        "Perplexity against the number of states",
        f"{subject['name']}, {subject['parameters']:,} parameters; {subject['windows']} windows of "
        f"{subject['context']} held-out tokens of {subject['text']}. The policy acts after every "
        "token. The paper, LLaMA-2-7B on PG-19: TOVA 7.41 at 512 of 4096 states, full 7.16, "
        "Window 2184.",
        ("policy", *(f"{slots}" for slots in sizes), f"{subject['context']}, full"),
        rows,
    )


def _kept_table(kept: Mapping[str, Any]) -> Table:
    stays = sorted(kept["stays"].items(), key=lambda item: -item[1][0])
    return Table(
        "Which tokens stay",
        f"TOVA-layer with {kept['slots']} states, last layer: for how much of the rest of the text "
        "a token of its first half is kept.",
        ("token", "kept for", "tokens"),
        [[kind, f"{share:.1%}", f"{count:,}"] for kind, (share, count) in stays],
    )


def _writing_table(writing: Mapping[str, Any]) -> Table:
    rows = [
        [
            name if not name.isdigit() else f"{name} states",
            f"{judged['tokens']}",
            f"{judged['tokens_a_paragraph']:.0f}",
            *(f"{judged[f'distinct_{n}']:.2f}" for n in (1, 2, 4)),
            number(judged["perplexity"]),
        ]
        for name, judged in writing["judged"].items()
    ]
    return Table(
        "Long texts, written with TOVA-layer",
        f"{writing['texts']} texts sampled at temperature 1 after prompts of {writing['prompt']} "
        "held-out tokens. Tokens written; how many of them between blank lines; different n-grams over all n-grams; the perplexity of "
        "what was written under the model with its full state, in place of a judge.",
        (
            "",
            "tokens",
            "tokens a paragraph",
            "distinct-1",
            "distinct-2",
            "distinct-4",
            "perplexity",
        ),
        rows,
    )


def _recall_table(found: Mapping[str, Any]) -> Table:
    return Table(
        "Key-value recall",
        f"Right answers with {found['slots']} states (full: {found['context']}), by the number of "
        f"tokens between {found['pairs']} pairs and the question. A decoder of its own, trained "
        "with its full state.",
        ("policy", *(f"{distance}" for distance in found["distances"])),
        [[name, *(f"{x:.0%}" for x in right)] for name, right in found["accuracy"].items()],
    )


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    full = rows[-1]["tokens_per_second"]
    cells = [
        [
            f"{row['slots']:,}",
            f"{row['batch']}",
            f"{row['bytes'] / 2**20:,.0f} MiB",
            number(row["tokens_per_second"]),
            f"{number(row['tokens_per_second'] / full, 2)}×",
        ]
        for row in rows
    ]
    return Table(
        "Throughput at one budget of memory",
        "Tokens a second at the largest batch whose states fit what the full state takes; "
        "whole decode steps. The paper, LLaMA-2-7B on a V100: 4.8× at an eighth.",
        ("states", "batch", "memory of the states", "tokens/s", "over the full state"),
        cells,
    )


def _draw_perplexity(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    found = result["perplexity"]
    for name, at in found["policies"].items():
        style = "-" if name.startswith("TOVA") else "--" if name.startswith("H2O") else ":"
        axes[0].plot(found["states"], list(at.values()), style, marker="o", label=name)
    axes[0].axhline(found["full"], color="#222", linewidth=1, label="full state")
    axes[0].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].set_xticks(found["states"], [str(slots) for slots in found["states"]])
    axes[0].set_xlabel("states")
    axes[0].set_ylabel("perplexity of held-out text")
    axes[0].legend(frameon=False, fontsize=9)


def _draw_kept(kept: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    expiry = torch.tensor(kept["expiry"])
    step = torch.arange(len(expiry))[:, None]
    visible = (step >= step.T) & (step < expiry)
    axes[0].grid(False)
    axes[0].imshow(visible, cmap="Greys", aspect="auto", interpolation="nearest")
    axes[0].set_xlabel("position of a token")
    axes[0].set_ylabel("after so many tokens")
    stays = sorted(kept["stays"].items(), key=lambda item: item[1][0])
    axes[1].barh([kind for kind, _ in stays], [share for _, (share, _) in stays], color="#0b6e4f")
    axes[1].set_xlabel("share of the rest of the text for which it is kept")


def _draw_recall(found: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for name, right in found["accuracy"].items():
        style = {"T": "-", "H": "--", "W": ":"}.get(name[0], "-.")
        axes[0].plot(found["distances"], right, style, marker="o", label=name)
    axes[0].set_xlabel("tokens between the pairs and the question")
    axes[0].set_ylabel("right answers")
    axes[0].set_ylim(0, 1.03)
    axes[0].legend(frameon=False, fontsize=9)


def section(result: Mapping[str, Any]) -> Section:
    subject, speed = result["subject"], result["speed"]
    gain = speed[0]["tokens_per_second"] / speed[-1]["tokens_per_second"]
    return Section(
        title="Transformers as multi-state RNNs: bounding the state",
        claim=(
            "A trained transformer needs few of its states: with TOVA and an eighth of them it is "
            "close to the full model (LLaMA-2-7B on PG-19: perplexity 7.41 against 7.16, a plain "
            "window 2184), ahead of H2O and of windows with attention sinks, and writes 4.8 times "
            "as many tokens a second on a V100."
        ),
        found=(
            f"{_verdict(result)} At one budget of memory an eighth of the states gives "
            f"{number(gain, 2)} times the throughput of the full state."
        ),
        comparable=_comparable(subject),
        tables=(
            _perplexity_table(result),
            _kept_table(result["kept"]),
            _writing_table(result["writing"]),
            _recall_table(result["recall"]),
            _speed_table(speed),
        ),
        plots=(
            Plot(
                "perplexity",
                "Perplexity of held-out text against the number of states.",
                partial(_draw_perplexity, result),
            ),
            Plot(
                "kept",
                f"TOVA-layer with {result['kept']['slots']} states, last layer. Left: which tokens "
                "are kept (dark) as the text goes on downwards. Right: which kinds stay.",
                partial(_draw_kept, result["kept"]),
                columns=2,
            ),
            Plot(
                "recall",
                f"Key-value recall with {result['recall']['slots']} states.",
                partial(_draw_recall, result["recall"]),
            ),
        ),
    )


def _comparable(subject: Mapping[str, Any]) -> str:
    if subject["trained_on"] is None:
        return (
            "Perplexities compare to the paper's as far as the checkpoint, the text and the "
            "context are the same; recall is of a small decoder, and throughput of this machine."
        )
    return (
        "The order of the policies compares to the paper's; the perplexities, of a decoder of "
        f"{subject['parameters']:,} parameters trained on {subject['trained_on']:,} tokens, and "
        "the throughput, of another machine and model, do not (--model measures a real checkpoint)."
    )
