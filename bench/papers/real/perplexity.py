"""Table 3 of the paper: perplexity against the number of states.

The policy acts after every token, so what a token sees does not depend on how long the text goes
on: one pass over 4,096 tokens has the figures of 2,048, too, and those of each position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import msrnn_ops as ms
from bench.papers import states
from bench.papers.checkpoint import Checkpoint
from bench.papers.decoder import AttendSequence, attend_all
from bench.papers.part import Options, Store
from bench.papers.real import perplexity_report
from bench.papers.real.intervals import say_perplexity
from bench.papers.real.subject import subject

POLICIES: dict[str, Callable[[int], ms.Policy]] = {
    **states.POLICIES,
    "TOVA-head+4": partial(ms.Policy.tova, scope="head", sinks=4),
    "TOVA-layer, half recent": lambda slots: ms.Policy.tova(slots, recent=slots // 2),
}
BINS = 32  # of positions in a text


@dataclass(frozen=True)
class Grid:
    """What is measured on one model."""

    model: str
    policies: Sequence[str]  # with the reference
    lengths: Sequence[int]  # of the texts, ascending
    sizes: Sequence[int]  # of the states
    excerpts: int


def quick(grid: Grid) -> Grid:
    return Grid(grid.model, grid.policies, (256, 512), (32, 128), 3)


def _binned(x: Tensor) -> list[float]:
    """Of (rows, T): means over equal parts of T and all rows."""
    return [float(part.mean()) for part in x.tensor_split(BINS, -1)]


def _figures(losses: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """Of losses (rows, T): each row's mean over the first tokens, and the course of the mean."""
    means = {str(length): losses[:, :length].double().mean(1).tolist() for length in lengths}
    return {"losses": means, "course": _binned(losses.double())}


def _batches(rows: Tensor) -> Sequence[Tensor]:
    """A row for each thread: threads that share a row wait for each other at every token."""
    return rows.split(torch.get_num_threads())


@torch.no_grad()
def full(model: Checkpoint, rows: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    return _figures(torch.cat([model.losses(x, attend_all) for x in _batches(rows)]), lengths)


@torch.no_grad()
def bounded(
    model: Checkpoint, rows: Tensor, lengths: Sequence[int], policy: ms.Policy
) -> dict[str, Any]:
    """The losses, and which positions are left at the end, on average over layers and heads."""
    losses, kept = [], []
    for some in _batches(rows):
        attend = AttendSequence(policy)
        losses.append(model.losses(some, attend))
        # (B, T): of all layers, the share of key-value heads that keep a position; a layer may
        # decide as one.
        left = [(x == x.shape[-1]).double().mean(1) for x in attend.expiry]
        kept.append(torch.stack(left).mean(0))
    left_of_all = torch.cat(kept)
    return {
        **_figures(torch.cat(losses), lengths),
        "kept": _binned(left_of_all),
        "first_four_kept": left_of_all[:, :4].mean(0).tolist(),
    }


def measure(grid: Grid, options: Options, store: Store) -> dict[str, Any]:
    grid = quick(grid) if options.quick else grid
    of = subject(grid.model, options, torch.bfloat16)
    length = of.fitting(grid.lengths[-1])
    lengths = [*(x for x in grid.lengths if x < length), length]
    excerpts = of.excerpts(length, grid.excerpts)
    whole = store.once("full", full, of.model, excerpts.rows, lengths)
    found: dict[str, dict[str, Any]] = {name: {} for name in grid.policies}
    pieces = [(name, slots) for name in grid.policies for slots in grid.sizes if slots < length]
    say_perplexity("full state", whole["losses"][str(length)])
    for name, slots in pieces:
        policy = POLICIES[name](slots)
        one = store.once(f"{name} {slots}", bounded, of.model, excerpts.rows, lengths, policy)
        say_perplexity(f"{name}, {slots} states", one["losses"][str(length)])
        found[name][str(slots)] = one
    return {
        "subject": of.facts,
        "excerpts": excerpts.names,
        "lengths": lengths,
        "full": whole,
        "policies": found,
    }


_USUAL = Grid(
    "smollm2",
    ("TOVA-layer", "H2O-layer", "Window+4", "Window+1", "Window"),
    (2048, 4096),
    (32, 64, 128, 256, 512, 1024),
    12,
)
run = partial(measure, _USUAL)
section = perplexity_report.section
