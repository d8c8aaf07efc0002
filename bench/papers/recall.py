"""Key-value recall: facts, then other tokens, then a key whose value is asked for.

It stands in for the long-range understanding benchmark of the paper, whose texts cannot be shipped.
Two ways: the policy after every token, so that nothing has asked for a fact while others crowd it
out; and a prompt that ends with the question, after which the state is reduced once, as in the
paper, and the question is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import msrnn_ops as ms
from bench.papers.decoder import AttendSequence, AttendStates, Decoder, Training, train
from bench.papers.part import Store


@dataclass(frozen=True)
class Task:
    facts: int  # told at the start, each one token that stands for a key and its value
    keys: int  # different ones; as many values, and as many other tokens
    distances: Sequence[int]  # other tokens between the facts and the question
    width: int
    layers: int
    heads: int
    training: Training
    batch: int
    rows: int  # of the evaluation, for each distance

    @property
    def context(self) -> int:
        """Tokens of the longest question."""
        return 2 + self.facts + max(self.distances)


QUICK = Task(
    facts=8,
    keys=16,
    distances=(0, 30, 118, 246),
    width=64,
    layers=2,
    heads=2,
    training=Training(steps=350, rate=3e-3, warmup=30),
    batch=32,
    rows=256,
)
FULL = Task(
    facts=64,
    keys=128,
    distances=(0, 126, 382, 894, 1918, 3966),
    width=256,
    layers=4,
    heads=4,
    training=Training(steps=10_000, rate=1e-3, warmup=500),
    batch=64,
    rows=512,
)


def _draw(
    task: Task, rows: int, distance: int, questions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences (rows, T) that end with so many keys, and their values (rows, questions)."""

    def several(of: int, count: int) -> Tensor:
        return torch.rand(rows, of, generator=generator).argsort(-1)[:, :count]

    keys = several(task.keys, task.facts)
    values = torch.randint(task.keys, keys.shape, generator=generator)
    others = torch.randint(task.keys, (rows, distance), generator=generator)
    asked = several(task.facts, questions)
    start = torch.zeros(rows, 1, dtype=torch.long)
    # 0, then keys, then other tokens, then facts.
    parts = (
        start,
        1 + task.keys * (2 + keys) + values,
        1 + task.keys + others,
        1 + keys.gather(1, asked),
    )
    return torch.cat(parts, 1), values.gather(1, asked)


def _lesson(task: Task, device: str, step: int) -> tuple[Tensor, Tensor]:
    """A training batch: every fact is asked for, after a distance that grows with training."""
    generator = torch.Generator().manual_seed(step)
    most = max(task.distances) * (step + 1) // task.training.steps
    distance = int(torch.randint(most + 1, (), generator=generator))
    tokens, values = _draw(task, task.batch, distance, task.facts, generator)
    targets = torch.full_like(tokens, -100)
    targets[:, -task.facts :] = values
    return tokens.to(device), targets.to(device)


Answer = Callable[[Decoder, Tensor], Tensor]  # tokens (rows, T) -> logits (rows, vocabulary)


def _at_once(model: Decoder, tokens: Tensor) -> Tensor:
    return model(tokens)[:, -1]


def _token_by_token(policy: ms.Policy, model: Decoder, tokens: Tensor) -> Tensor:
    return model(tokens, AttendSequence(policy))[:, -1]


def _after_a_prompt(policy: ms.Policy, model: Decoder, tokens: Tensor) -> Tensor:
    attend = AttendStates(policy)
    model(tokens, attend)
    return model(tokens[:, -1:], attend, tokens.shape[1])[:, -1]


@torch.no_grad()
def _accuracy(model: Decoder, task: Task, device: str, answer: Answer) -> list[float]:
    """The share of right answers at every distance."""
    found = []
    for distance in task.distances:
        generator = torch.Generator().manual_seed(1_000_000 + distance)
        right = 0
        for first in range(0, task.rows, task.batch):
            rows = min(task.batch, task.rows - first)
            tokens, values = _draw(task, rows, distance, 1, generator)
            logits = answer(model, tokens.to(device))
            right += int((logits.argmax(-1).cpu() == values[:, 0]).sum())
        found.append(right / task.rows)
    return found


def run(
    task: Task, policies: Mapping[str, Callable[[int], ms.Policy]], device: str, store: Store
) -> dict[str, Any]:
    """Trains with full attention, then bounds the state to an eighth of the longest question."""
    torch.manual_seed(0)
    model = Decoder(1 + task.keys * (2 + task.keys), task.width, task.layers, task.heads)
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02)  # from larger ones it does not learn to match keys
    model.to(device)
    losses = train(model, lambda step: _lesson(task, device, step), task.training, "recall", store)
    slots = task.context // 8
    by_token, by_prompt = {}, {}
    for name, policy in track(policies.items(), "recall, policies"):
        bounded = policy(slots)
        by_token[name] = _accuracy(model, task, device, partial(_token_by_token, bounded))
        by_prompt[name] = _accuracy(model, task, device, partial(_after_a_prompt, bounded))
    return {
        "facts": task.facts,
        "context": task.context,
        "slots": slots,
        "distances": list(task.distances),
        "losses": losses,
        "full": _accuracy(model, task, device, _at_once),
        "token_by_token": by_token,
        "after_a_prompt": by_prompt,
    }
