"""The part ``text``: one small character-level language model with four recurrences.

Same width, data, seed and schedule for minGRU, minLSTM, nn.GRU and nn.LSTM. Our models then write
text one character at a time through the step form, which must agree with the parallel one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import msrnn_ops as ms
from bench.measure import timing

STEPS = 200
FULL_STEPS = 1000
_WIDTH = 128
_LAYERS = 2
_BATCH = 16
_TIME = 128
_RATE = 3e-3
_WARMUP = 20  # steps
_EVERY = 10  # steps between points of the loss curve
_HELD_OUT_WINDOWS = 256
_PROMPT = 64
_GENERATED = 200
_TEMPERATURE = 0.7


class Fused(nn.Module):
    """minGRU or minLSTM: one projection, then our op on the whole of it."""

    def __init__(self, width: int, parts: int, joint: Callable[..., Tensor], step: Any) -> None:
        super().__init__()
        self.parts, self.joint, self.one_step = parts, joint, step
        self.projection = nn.Linear(width, parts * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.joint(self.projection(x))

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return cast(Tensor, self.one_step(*self.projection(x).chunk(self.parts, -1), h))


class Standard(nn.Module):
    """nn.GRU or nn.LSTM."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], width: int) -> None:
        super().__init__()
        self.layer = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x)[0])


RECURRENCES: dict[str, Callable[[int], nn.Module]] = {
    "minGRU": lambda width: Fused(width, 2, ms.min_gru_joint, ms.min_gru_step),
    "minLSTM": lambda width: Fused(width, 3, ms.min_lstm_joint, ms.min_lstm_step),
    "nn.GRU": lambda width: Standard(nn.GRU, width),
    "nn.LSTM": lambda width: Standard(nn.LSTM, width),
}


class Block(nn.Module):
    def __init__(self, recurrence: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def _after(self, x: Tensor, h: Tensor) -> Tensor:
        x = x + self.out(h)
        return x + cast(Tensor, self.mlp(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._after(x, self.recurrence(self.norm(x)))

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = cast(Fused, self.recurrence).step(self.norm(x), h)
        return self._after(x, h), h


class Model(nn.Module):
    def __init__(self, recurrence: Callable[[int], nn.Module], characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, _WIDTH)
        self.blocks = nn.ModuleList(Block(recurrence(_WIDTH), _WIDTH) for _ in range(_LAYERS))
        self.head = nn.Sequential(nn.RMSNorm(_WIDTH), nn.Linear(_WIDTH, characters))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, characters) of tokens (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))

    def start(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, _WIDTH) for _ in self.blocks]

    def step(self, token: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, characters) of one token (B,) and the states after it."""
        x, after = self.embedding(token), []
        for block, h in zip(self.blocks, states, strict=True):
            x, h = cast(Block, block).step(x, h)
            after.append(h)
        return self.head(x), after


@dataclass(frozen=True)
class Corpus:
    name: str
    characters: str
    train: Tensor
    held_out: Tensor

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.characters[token] for token in tokens)


def load(path: Path | None) -> Corpus:
    """A text file, or the documentation that every CPython carries; the last tenth is held out."""
    if path is None:
        from pydoc_data.topics import topics

        name, text = "pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics))
    else:
        name, text = path.name, path.read_text(encoding="utf-8")
    characters = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in text])
    split = len(tokens) * 9 // 10
    if len(tokens) - split < 2 * (_TIME + 1):
        raise ValueError(f"the text is too short: {len(text)} characters")
    return Corpus(name, characters, tokens[:split], tokens[split:])


def _bits(model: Model, windows: Tensor) -> Tensor:
    """Mean bits per character of windows (B, T + 1)."""
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def _held_out_bits(model: Model, held_out: Tensor) -> float:
    windows = held_out.unfold(0, _TIME + 1, _TIME)[:_HELD_OUT_WINDOWS]
    total = 0.0
    for start in range(0, len(windows), _BATCH):
        part = windows[start : start + _BATCH]
        total += float(_bits(model, part)) * len(part)
    return total / len(windows)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return min((step + 1) / _WARMUP, 1.0) * cosine


def _train(model: Model, train: Tensor, steps: int, report: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    windows = train.unfold(0, _TIME + 1, 1)
    curve, times, recent = [], [], []
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (_BATCH,), generator=generator)]
        start = time.perf_counter()
        optimizer.zero_grad()
        bits = _bits(model, batch)
        bits.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        schedule.step()
        recent.append(bits.item())
        if step == 0 or (step + 1) % _EVERY == 0:
            curve.append({"step": step + 1, "bits_per_character": sum(recent) / len(recent)})
            recent = []
        report(curve[-1]["bits_per_character"], _BATCH * _TIME * len(times) / sum(times))
    return {"curve": curve, "step_time": timing(times), "seconds": sum(times)}


@torch.no_grad()
def _step_difference(model: Model, tokens: Tensor) -> float:
    """The largest difference between the logits of the step form and of the parallel form."""
    states, steps = model.start(1), []
    for token in tokens:
        logits, states = model.step(token[None], states)
        steps.append(logits)
    return float((torch.stack(steps, 1) - model(tokens[None])).abs().max())


@torch.no_grad()
def _generate(model: Model, prompt: Tensor) -> tuple[list[int], float]:
    """Characters that follow the prompt, one at a time, and how many a second."""
    generator = torch.Generator().manual_seed(2)
    states, written = model.start(1), []
    logits = torch.empty(0)
    for token in prompt:
        logits, states = model.step(token[None], states)
    start = time.perf_counter()
    for _ in range(_GENERATED):
        token = torch.multinomial((logits[0] / _TEMPERATURE).softmax(0), 1, generator=generator)
        written.append(int(token))
        logits, states = model.step(token, states)
    return written, _GENERATED / (time.perf_counter() - start)


def _run_model(name: str, corpus: Corpus, steps: int, progress: Progress) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(RECURRENCES[name], len(corpus.characters))
    task = progress.add_task(f"text    {name:7}", total=steps, figures="")

    def report(bits: float, speed: float) -> None:
        figures = f"{bits:.2f} bits per character, {speed:,.0f} tokens/s"
        progress.update(task, advance=1, figures=figures)

    trained = _train(model, corpus.train, steps, report)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **trained,
        "tokens_per_second": _BATCH * _TIME / trained["step_time"]["median"],
        "held_out_bits_per_character": _held_out_bits(model, corpus.held_out),
    }
    if name in ("minGRU", "minLSTM"):
        prompt = corpus.held_out[:_PROMPT]
        written, speed = _generate(model, prompt)
        result |= {
            "step_difference": _step_difference(model, corpus.held_out[:_TIME]),
            "prompt": corpus.decode(prompt.tolist()),
            "generated": corpus.decode(written),
            "generated_per_second": speed,
        }
    return result


def run(path: Path | None, steps: int) -> dict[str, Any]:
    corpus = load(path)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as progress:
        models = {name: _run_model(name, corpus, steps, progress) for name in RECURRENCES}
    return {
        "text": corpus.name,
        "characters": len(corpus.train) + len(corpus.held_out),
        "vocabulary": len(corpus.characters),
        "width": _WIDTH,
        "layers": _LAYERS,
        "batch": _BATCH,
        "time": _TIME,
        "steps": steps,
        "models": models,
    }
