"""How much of its attention the full model pays to tokens that a policy would have kept.

One pass with full attention has all queries and keys, and each policy decides on them. So all are
asked the same question, and no loss of an earlier layer mixes with the choice of a later one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

import msrnn_ops as ms
from bench.papers.checkpoint import Checkpoint
from bench.papers.decoder import attend_all
from bench.papers.part import Options, Plot, Section, Store
from bench.papers.real.intervals import interval
from bench.papers.real.perplexity import POLICIES
from bench.papers.real.subject import subject
from bench.table import Table, say

_LENGTH, _EXCERPTS = 2048, 12
_SIZES = (32, 128, 512)
_NAMES = (
    "TOVA-layer",
    "TOVA-layer, half recent",
    "TOVA-head",
    "H2O-layer",
    "Window+4",
    "Window",
)
_BEST = "most attended"  # by each query of a layer: no decision of the layer can keep more
_EVERY = 8  # queries of which one is looked at


class Shares:
    """Full attention that adds up each policy's shares; one entry a layer."""

    def __init__(self, policies: Mapping[str, ms.Policy]) -> None:
        self.policies = policies
        self.layers: dict[str, list[float]] = {name: [] for name in policies}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, heads = q.shape[2], k.shape[1]
        queries = torch.arange(length // 2, length, _EVERY, device=q.device)
        asked = q[0, :, queries].float().unflatten(0, (heads, -1))  # (Hkv, Hq / Hkv, Q, Dh)
        logits = asked @ k[0].float().mT.unsqueeze(1) * q.shape[-1] ** -0.5
        later = torch.arange(length, device=q.device) > queries[:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        for name, policy in self.policies.items():
            if name.startswith(_BEST):
                mean = weights.mean((0, 1))  # one choice for the layer, as most policies make
                share = mean.topk(policy.slots + 1).values.sum(-1)
            else:
                expiry = ms.attend_sequence(q, k, v, policy)[1][0]
                there = expiry[:, None] > queries[:, None]  # (G, Q, T)
                share = (weights * there.unsqueeze(1)).sum(-1)
            self.layers[name].append(float(share.mean()))
        return attend_all(layer, q, k, v)


@torch.no_grad()
def shares(
    model: Checkpoint, tokens: Tensor, policies: Mapping[str, ms.Policy]
) -> dict[str, list[float]]:
    """Of tokens (T,): each policy's share in each layer, by the second half of the queries."""
    attend = Shares(policies)
    model.hidden(tokens[None], attend)
    return attend.layers


def run(options: Options, store: Store) -> dict[str, Any]:
    length, number_of = _LENGTH, _EXCERPTS
    sizes: Sequence[int] = _SIZES
    if options.quick:
        length, number_of, sizes = 256, 2, (32, 64)
    of = subject("smollm2", options, torch.bfloat16)
    length = of.fitting(length)
    excerpts = of.excerpts(length, number_of)
    sizes = [slots for slots in sizes if slots < length // 2]
    policies = {f"{name} {n}": POLICIES[name](n) for name in _NAMES for n in sizes}
    policies |= {f"{_BEST} {n}": ms.Policy.window(n) for n in sizes}
    found = []
    for i, row in enumerate(excerpts.rows):
        found.append(store.once(f"excerpt {i}", shares, of.model, row[:-1], policies))
        say(f"excerpt {i}: " + ", ".join(
            f"{name} {statistics.mean(layers):.1%}"
            for name, layers in found[-1].items() if name.endswith(f" {sizes[0]}")
        ))  # fmt: skip
    return {
        "subject": of.facts,
        "excerpts": excerpts.names,
        "length": length,
        "sizes": sizes,
        "shares": found,
    }


def _of_excerpts(result: Mapping[str, Any], name: str, slots: int) -> list[float]:
    return [statistics.mean(one[f"{name} {slots}"]) for one in result["shares"]]


def _table(result: Mapping[str, Any]) -> Table:
    rows = []
    for name in (_BEST, *_NAMES):
        cells = []
        for slots in result["sizes"]:
            middle, low, high = interval(_of_excerpts(result, name, slots))
            cells.append(f"{100 * middle:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        rows.append([name, *cells])
    return Table(
        "Attention kept",
        f"Percent of the full model's attention, over all layers and heads, that the second half "
        f"of {result['length']:,} tokens pays to what is kept; 95 % intervals over "
        f"{len(result['excerpts'])} excerpts. In the first row each query chooses for itself what "
        "its layer attends to most.",
        ("policy", *(f"{slots} states" for slots in result["sizes"])),
        rows,
    )


def _draw(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for slots, one in zip(result["sizes"], axes, strict=True):
        for name in (_BEST, *_NAMES):
            layers = zip(*(x[f"{name} {slots}"] for x in result["shares"]), strict=True)
            style = {"TOVA": "-", "H2O": "--", _BEST: "-."}.get(name.partition("-")[0], ":")
            one.plot([100 * statistics.mean(x) for x in layers], style, label=name)
        one.set_title(f"{slots} states")
        one.set_xlabel("layer")
        one.set_ylabel("% of the full model's attention")
    axes[-1].legend(frameon=False, fontsize=9)


def section(result: Mapping[str, Any]) -> Section:
    said = []
    for slots in result["sizes"]:
        kept = [
            f"{name} {100 * statistics.mean(_of_excerpts(result, name, slots)):.1f} %"
            for name in (*_NAMES, _BEST)
        ]
        said.append(f"{slots} states: {', '.join(kept)}")
    return Section(
        title="How much attention each policy keeps",
        claim="TOVA keeps the tokens that the model attends to, which recency alone does not.",
        found="; ".join(said) + ".",
        comparable=(
            "The paper looks at what TOVA keeps, not at how much attention that draws; the model "
            "is another one."
        ),
        tables=[_table(result)],
        plots=[
            Plot(
                "layers",
                "Attention paid to what each policy keeps, by layer.",
                partial(_draw, result),
                columns=len(result["sizes"]),
            )
        ],
    )
