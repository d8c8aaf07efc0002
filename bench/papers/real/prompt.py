"""The policy once, after a prompt, and then after every token: as a server applies it.

The prompt is read once with full attention, for all policies together; each reduces its queries,
keys and values to its own state, with which the text goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import msrnn_ops as ms
from bench.papers.checkpoint import Checkpoint
from bench.papers.decoder import AttendSequence, AttendStates, attend_all
from bench.papers.part import Options, Section, Store
from bench.papers.real.intervals import difference, percent, perplexity, say_perplexity
from bench.papers.real.perplexity import POLICIES
from bench.papers.real.subject import subject
from bench.table import Table, number
from msrnn_ops import backend
from msrnn_ops.operators.multi_state import IN_PLACE

_PROMPT, _STEPS, _EXCERPTS = 1792, 128, 12
_POLICIES = (
    "TOVA-layer",
    "TOVA-layer, half recent",
    "TOVA-head",
    "H2O-layer",
    "H2O-head",
    "Window+4",
)
_SIZES = (32, 128, 512)

# Of each layer: queries, keys and values of all rows.
Read = list[tuple[Tensor, Tensor, Tensor]]


class _Kept:
    """Full attention that remembers what it was given."""

    def __init__(self) -> None:
        self.layers: Read = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert layer == len(self.layers)
        self.layers.append((q, k, v))
        return attend_all(layer, q, k, v)


@torch.no_grad()
def read(model: Checkpoint, prompts: Tensor) -> tuple[Read, Tensor]:
    """What each layer sees of prompts (B, T), and the logits after them, (B, vocabulary)."""
    rows, last = [], []
    for prompt in prompts:
        kept = _Kept()
        last.append(model.model.lm_head(model.hidden(prompt[None], kept)[:, -1]).float())
        rows.append(kept.layers)
    layers: Read = []
    for layer in zip(*rows, strict=True):
        q, k, v = (torch.cat(x) for x in zip(*layer, strict=True))
        layers.append((q, k, v))
    return layers, torch.cat(last)


def reduced(prompts: Read, policy: ms.Policy) -> AttendStates:
    """The states of a prompt: what attend_prompt keeps, without its output, which is known."""
    attend = AttendStates(policy)
    for layer, (q, k, v) in enumerate(prompts):
        batch, heads, _, head_dim = k.shape
        attend.states[layer] = state = ms.MultiState(
            policy, batch=batch, kv_heads=heads, head_dim=head_dim, dtype=k.dtype, device=k.device
        )
        namespace = backend.namespace("attend_prompt", k.device)
        if namespace is None:
            attend(layer, q, k, v)
            continue
        store, scale = IN_PLACE[namespace, "store_prompt"], head_dim**-0.5
        store(q, k, v, None, None, *state.tensors(), *policy.numbers, scale)
    return attend


@torch.no_grad()
def continued(
    model: Checkpoint, prompts: Read, rows: Tensor, steps: int, policy: ms.Policy
) -> list[float]:
    """The mean loss of each row's last `steps` tokens, after a prompt that was reduced at once."""
    attend = reduced(prompts, policy)
    total = torch.zeros(len(rows), dtype=torch.double)
    first = rows.shape[1] - 1 - steps
    for step in range(first, rows.shape[1] - 1):
        logits = model(rows[:, step : step + 1], attend, step)[:, 0].float()
        total += cross_entropy(logits, rows[:, step + 1], reduction="none").cpu()
    return (total / steps).tolist()


@torch.no_grad()
def at_every_token(
    model: Checkpoint, rows: Tensor, steps: int, policy: ms.Policy | None
) -> list[float]:
    """The same tokens, where the policy acts after each token of the prompt, too; None: full."""
    found = []
    for row in rows:
        attend = attend_all if policy is None else AttendSequence(policy)
        found.append(float(model.losses(row[None], attend)[0, -steps:].double().mean()))
    return found


def run(options: Options, store: Store) -> dict[str, Any]:
    prompt, steps, number_of, sizes = _PROMPT, _STEPS, _EXCERPTS, _SIZES
    if options.quick:
        prompt, steps, number_of, sizes = 256, 16, 2, (32, 64, 128)
    of = subject("smollm2", options, torch.bfloat16)
    prompt = of.fitting(prompt + steps) - steps
    excerpts = of.excerpts(prompt + steps, number_of)
    read_once: list[Read] = []

    def once(slots: int, name: str) -> list[float]:
        if not read_once:
            read_once.append(read(of.model, excerpts.rows[:, :prompt])[0])
        policy = POLICIES[name](slots)
        return continued(of.model, read_once[0], excerpts.rows, steps, policy)

    def always(slots: int, name: str) -> list[float]:
        return at_every_token(of.model, excerpts.rows, steps, POLICIES[name](slots))

    whole = store.once("full", at_every_token, of.model, excerpts.rows, steps, None)
    pieces = [(name, slots) for name in _POLICIES for slots in sizes]
    found: dict[str, dict[str, dict[str, list[float]]]] = {"once": {}, "always": {}}
    say_perplexity("full state", whole)
    for name, slots in pieces:
        for way, measured in {"once": once, "always": always}.items():
            losses = store.once(f"{way} {name} {slots}", measured, slots, name)
            say_perplexity(f"{name}, {slots} states, {_WAYS[way]}", losses)
            found[way].setdefault(name, {})[str(slots)] = losses
    return {
        "subject": of.facts,
        "excerpts": excerpts.names,
        "prompt": prompt,
        "steps": steps,
        "full": whole,
        **found,
    }


_WAYS = {"once": "once after the prompt", "always": "after every token"}


def _table(result: Mapping[str, Any], way: str) -> Table:
    found = result[way]
    sizes = list(found[_POLICIES[0]])
    rows = []
    for name in _POLICIES:
        cells = [number(perplexity(found[name][slots]), 4) for slots in sizes]
        if name != _POLICIES[0]:
            for i, slots in enumerate(sizes):
                apart = difference(found[_POLICIES[0]][slots], found[name][slots])
                cells[i] += f", {percent(apart)}"
        rows.append([name, *cells])
    return Table(
        f"The policy {_WAYS[way]}",
        f"Perplexity of {result['steps']} tokens after {result['prompt']:,} by the number of "
        f"states, and percent above {_POLICIES[0]}; the full state has "
        f"{number(perplexity(result['full']), 4)}.",
        ("policy", *(f"{int(slots):,}" for slots in sizes)),
        rows,
    )


def section(result: Mapping[str, Any]) -> Section:
    tova = _POLICIES[0]
    said = []
    for slots in result["once"][tova]:
        apart = difference(result["always"][tova][slots], result["once"][tova][slots])
        said.append(f"{percent(apart)} with {slots} states")
    return Section(
        title="A prompt reduced at once",
        claim=(
            "The paper applies a policy after every token in its perplexities, and once after the "
            "prompt in its long-range tasks, as servers do."
        ),
        found=(
            f"In percent of the perplexity of {tova} after every token, reducing the prompt at "
            f"once changes it by {'; '.join(said)}."
        ),
        comparable=(
            f"One model, {len(result['excerpts'])} excerpts, {result['steps']} tokens of each, so "
            "intervals are wide."
        ),
        tables=[_table(result, way) for way in _WAYS],
    )
