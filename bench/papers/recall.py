"""Key-value recall: pairs, then other tokens, then a key whose value is asked for.

It stands in for the long-range understanding benchmark of the paper, whose texts cannot be shipped:
an answer needs a state from far behind, which nothing on the way there has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import msrnn_ops as ms
from bench.papers.decoder import (
    Attend,
    AttendSequence,
    Decoder,
    Training,
    attend_all,
    train,
)
from bench.papers.part import Store


@dataclass(frozen=True)
class Task:
    pairs: int
    keys: int  # different ones; as many values and other tokens
    distances: Sequence[int]  # other tokens between the pairs and the question
    width: int
    layers: int
    heads: int
    training: Training
    batch: int
    rows: int  # of the evaluation, for each distance

    @property
    def context(self) -> int:
        """Tokens of the longest question."""
        return 2 + 2 * self.pairs + max(self.distances)


QUICK = Task(
    pairs=8,
    keys=32,
    distances=(0, 30, 110, 238),
    width=64,
    layers=2,
    heads=2,
    training=Training(steps=600, rate=3e-3, warmup=30),
    batch=32,
    rows=256,
)
FULL = Task(
    pairs=64,
    keys=512,
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
    """Sequences (rows, T) and the values that are asked for (rows, questions).

    The questions are the last 2 * questions - 1 tokens: keys, each but the last with its value.
    """

    def several(of: int, count: int) -> Tensor:
        return torch.rand(rows, of, generator=generator).argsort(-1)[:, :count]

    keys = 1 + several(task.keys, task.pairs)
    values = 1 + task.keys + torch.randint(task.keys, keys.shape, generator=generator)
    others = torch.randint(task.keys, (rows, distance), generator=generator)
    pairs = torch.stack([keys, values], -1)
    asked = several(task.pairs, questions)[..., None].expand(-1, -1, 2)
    asked = pairs.gather(1, asked)
    start = torch.zeros(rows, 1, dtype=torch.long)
    parts = [start, pairs.flatten(1), 1 + 2 * task.keys + others, asked.flatten(1)[:, :-1]]
    return torch.cat(parts, 1), asked[..., 1]


def _lesson(task: Task, device: str, step: int) -> tuple[Tensor, Tensor]:
    """A training batch: every pair is asked for, after a random distance."""
    generator = torch.Generator().manual_seed(step)
    distance = int(torch.randint(max(task.distances) + 1, (), generator=generator))
    tokens, values = _draw(task, task.batch, distance, task.pairs, generator)
    targets = torch.full_like(tokens, -100)
    targets[:, -2 * task.pairs + 1 :: 2] = values
    return tokens.to(device), targets.to(device)


@torch.no_grad()
def _accuracy(model: Decoder, task: Task, device: str, attend: Callable[[], Attend]) -> list[float]:
    """The share of right answers at every distance."""
    found = []
    for distance in task.distances:
        generator = torch.Generator().manual_seed(1_000_000 + distance)
        right = 0
        for first in range(0, task.rows, task.batch):
            rows = min(task.batch, task.rows - first)
            tokens, values = _draw(task, rows, distance, 1, generator)
            logits = model(tokens.to(device), attend())
            right += int((logits[:, -1].argmax(-1).cpu() == values[:, 0]).sum())
        found.append(right / task.rows)
    return found


def run(
    task: Task, policies: Mapping[str, Callable[[int], ms.Policy]], device: str, store: Store
) -> dict[str, Any]:
    """Trains with full attention, then bounds the state to an eighth of the longest question."""
    torch.manual_seed(0)
    model = Decoder(1 + 3 * task.keys, task.width, task.layers, task.heads).to(device)
    losses = train(model, lambda step: _lesson(task, device, step), task.training, "recall", store)
    slots = task.context // 8
    accuracy = {"full": _accuracy(model, task, device, lambda: attend_all)}
    for name, policy in track(policies.items(), "recall, policies"):
        accuracy[name] = _accuracy(model, task, device, partial(AttendSequence, policy(slots)))
    return {
        "pairs": task.pairs,
        "context": task.context,
        "slots": slots,
        "distances": list(task.distances),
        "losses": losses,
        "accuracy": accuracy,
    }
