"""A small decoder transformer, the ways it can attend, and its training.

What a model attends to is a function that it is called with, so that one set of weights runs with
full attention, as a finite multi-state RNN over a whole sequence, and step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import msrnn_ops as ms
from bench.papers.models import rotate, schedule
from bench.papers.part import Store

# (layer, q (B, Hq, T, Dh), k, v (B, Hkv, T, Dh)) -> (B, Hq, T, Dh)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_PIECES = 10  # of a training run: it goes on after the last one that was finished


def attend_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention to everything."""
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class AttendSequence:
    """The policy after every token of a whole sequence; `expiry` has one entry a layer."""

    def __init__(self, policy: ms.Policy) -> None:
        self.policy = policy
        self.expiry: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, expiry = ms.attend_sequence(q, k, v, self.policy)
        self.expiry.append(expiry)
        return out


class AttendStates:
    """One state a layer: a prompt first, reduced once, then token by token."""

    def __init__(self, policy: ms.Policy) -> None:
        self.policy = policy
        self.states: dict[int, ms.MultiState] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer not in self.states:
            batch, heads, _, head_dim = k.shape
            self.states[layer] = ms.MultiState(
                self.policy,
                batch=batch,
                kv_heads=heads,
                head_dim=head_dim,
                dtype=k.dtype,
                device=k.device,
            )
        state = self.states[layer]
        if q.shape[2] > 1:
            return ms.attend_prompt(q, k, v, state)
        return ms.attend_evict(q[:, :, 0], k[:, :, 0], v[:, :, 0], state).unsqueeze(2)


class LanguageModel(Protocol):
    """Logits (B, T, vocabulary) of tokens (B, T), of which the first is number `start`."""

    def __call__(self, tokens: Tensor, attend: Attend = ..., start: int = ...) -> Tensor: ...


class _Block(nn.Module):
    def __init__(self, layer: int, width: int, heads: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, heads
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, attend: Attend, start: int) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        attended = attend(self.layer, rotate(q, start), rotate(k, start), v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, value = self.up(self.before_mlp(x)).chunk(2, -1)
        return x + cast(Tensor, self.down(silu(gate) * value))


class Decoder(nn.Module):
    """Pre-norm, rotary positions, gated MLP, no biases; as Llama."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(layer, width, heads) for layer in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, attend: Attend = attend_all, start: int = 0) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, attend, start)
        return cast(Tensor, self.head(self.norm(x)))


@dataclass(frozen=True)
class Training:
    steps: int
    rate: float
    warmup: int


def train(
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    training: Training,
    name: str,
    store: Store,
) -> list[float]:
    """Trains on batch(step), tokens and targets (-100: none); the mean loss of every piece.

    A run that was stopped goes on after the last finished piece, of which there are ten.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, betas=(0.9, 0.95))
    device = next(model.parameters()).device

    def saved(step: int) -> Path:
        return store.file(f"{name}-{step}.pt")

    def piece(start: int, end: int) -> float:
        if start:
            before = torch.load(saved(start), map_location=device)
            model.load_state_dict(before["model"])
            optimizer.load_state_dict(before["optimizer"])
        total = 0.0
        for step in range(start, end):
            tokens, targets = batch(step)
            for group in optimizer.param_groups:
                group["lr"] = training.rate * schedule(step, training.steps, training.warmup)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens)
            loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            progress.update(task, completed=step + 1)
        after = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(after, saved(end))
        return total / max(end - start, 1)

    edges = [training.steps * i // _PIECES for i in range(_PIECES + 1)]
    losses = []
    with Progress() as progress:
        task = progress.add_task(f"{name}, training", total=training.steps)
        for start, end in pairwise(edges):
            losses.append(store.once(f"{name} {end}", piece, start, end))
            saved(start).unlink(missing_ok=True)
            progress.update(task, completed=end)
    model.load_state_dict(torch.load(saved(edges[-1]), map_location=device)["model"])
    return losses
