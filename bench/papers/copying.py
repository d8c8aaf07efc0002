"""Selective copying: the paper's Table 1, accuracy against the number of layers.

A sequence of noise holds a few tokens at random places; after it the model writes them in order.
A gate that sees the input can drop the noise; only a second layer's gates can see how many tokens
came before.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.papers.models import SequenceModel, fit, parameters
from bench.papers.part import Options, Plot, Section, Store
from bench.table import Table

NAME = "copying"
PAPER = {  # Feng et al. 2024, Table 1: accuracy in percent with 1, 2 and 3 layers
    "minGRU": {1: 37.1, 2: 96.8, 3: 99.5},
    "minLSTM": {1: 37.6, 2: 85.7, 3: 96.0},
}
_NOISE, _RECALL = 0, 1  # tokens that stand for nothing and for "write the next one"
_HELD_OUT = 1024  # sequences


@dataclass(frozen=True)
class Setting:
    length: int  # of the noise
    remembered: int
    vocabulary: int
    width: int
    expansion: float
    mlp: float
    batch: int
    steps: int
    rate: float
    every: int
    seeds: tuple[int, ...]
    layers: tuple[int, ...] = (1, 2, 3)


QUICK = Setting(40, 5, 16, 64, 1.0, 0.0, 64, 1500, 6e-3, 100, (0,))
FULL = Setting(4096, 16, 16, 64, 6.0, 0.0, 64, 400_000, 3e-4, 2000, (0, 1, 2))


def draw(setting: Setting, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (B, length + remembered) and the tokens (B, remembered) to write at their end."""
    device, shape = generator.device, (batch, setting.remembered)
    tokens = torch.randint(
        _RECALL + 1, setting.vocabulary, shape, generator=generator, device=device
    )
    places = torch.rand(batch, setting.length, generator=generator, device=device)
    places = places.topk(setting.remembered).indices.sort().values
    noise = torch.full((batch, setting.length), _NOISE, device=device)
    recall = torch.full(shape, _RECALL, device=device)
    return torch.cat([noise.scatter(1, places, tokens), recall], 1), tokens


def _train(setting: Setting, kind: str, layers: int, seed: int, device: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = SequenceModel(
        kind,
        nn.Embedding(setting.vocabulary, setting.width),
        setting.width,
        layers,
        setting.vocabulary,
        expansion=setting.expansion,
        mlp=setting.mlp,
    ).to(device)
    generator = torch.Generator(device).manual_seed(seed + 1)
    held_out = draw(setting, _HELD_OUT, torch.Generator(device).manual_seed(seed + 2))

    def logits(x: Tensor) -> Tensor:
        return model(x)[:, -setting.remembered :]

    def loss() -> Tensor:
        x, tokens = draw(setting, setting.batch, generator)
        return cross_entropy(logits(x).flatten(0, 1), tokens.flatten())

    def accuracy() -> float:
        parts = zip(*(x.split(setting.batch) for x in held_out), strict=True)
        right = sum((logits(x).argmax(-1) == tokens).sum() for x, tokens in parts)
        return float(right) / held_out[1].numel()

    curve = fit(
        model,
        loss,
        accuracy,
        steps=setting.steps,
        rate=setting.rate,
        every=setting.every,
        label=f"copying  {kind:7} {layers} layer{'s' if layers > 1 else ' '}",
        solved=lambda value: value >= 0.999,
    )
    return {"accuracy": curve[-1]["value"], "curve": curve, "parameters": parameters(model)}


def run(options: Options, store: Store) -> dict[str, Any]:
    setting = FULL if options.full else QUICK
    runs = []
    for kind, layers, seed in itertools.product(PAPER, setting.layers, setting.seeds):
        key = f"{kind}, {layers} layers, seed {seed}"
        trained = store.once(key, _train, setting, kind, layers, seed, options.device)
        runs.append({"kind": kind, "layers": layers, "seed": seed, **trained})
    return {"setting": vars(setting), "runs": runs}


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _draw(result: dict[str, Any]) -> Any:
    def onto(axes: Sequence[Axes]) -> None:
        for plot, kind in zip(axes, PAPER, strict=True):
            for one in result["runs"]:
                if one["kind"] == kind and one["seed"] == result["setting"]["seeds"][0]:
                    steps = [point["step"] for point in one["curve"]]
                    values = [100 * point["value"] for point in one["curve"]]
                    plot.plot(steps, values, label=f"layers: {one['layers']}")
            plot.set(title=kind, xlabel="training steps", ylabel="accuracy (%)", ylim=(0, 102))
            plot.legend(frameon=False, loc="lower right")

    return onto


def section(result: dict[str, Any]) -> Section:
    setting = result["setting"]
    accuracy: dict[tuple[str, int], list[float]] = {}
    for one in result["runs"]:
        accuracy.setdefault((one["kind"], one["layers"]), []).append(one["accuracy"])
    rows = [
        [kind, str(layers), _percent(values), f"{PAPER[kind][layers]:.1f}"]
        for (kind, layers), values in accuracy.items()
    ]
    deep, flat = max(setting["layers"]), min(setting["layers"])
    best = statistics.mean(accuracy["minGRU", deep])
    worst = statistics.mean(accuracy["minGRU", flat])
    holds = best >= 0.99 and best - worst >= 0.1
    shape = f"{setting['remembered']} tokens in {setting['length']:,} steps of noise"
    return Section(
        title="Selective copying",
        claim="With 16 tokens in 4,096 steps, three layers of minGRU reach 99.5 % and three of "
        "minLSTM 96.0 %; one layer of either stays below 40 %.",
        found=f"With {shape}, minGRU writes {best:.1%} of the tokens right with {deep} layers and "
        f"{worst:.1%} with {flat}: depth {'is' if holds else 'is not'} what solves the task here.",
        comparable="The task, the vocabulary of 16 and the layers are the paper's; "
        + (
            "length, tokens, batch, learning rate and steps too, but a run ends once it is solved."
            if (setting["length"], setting["remembered"]) == (4096, 16)
            else "a shorter sequence and fewer tokens make it learnable in a minute, so the order "
            "of the accuracies compares and their values do not."
        ),
        tables=[
            Table(
                "Accuracy",
                f"Percent of {_HELD_OUT:,} held-out sequences' tokens; {shape}, width "
                f"{setting['width']}, {setting['expansion']:g} times that in the recurrence, "
                f"at most {setting['steps']:,} steps of {setting['batch']} sequences.",
                ("model", "layers", "accuracy here (%)", "in the paper (%)"),
                rows,
            )
        ],
        plots=[Plot("accuracy", "Accuracy on held-out sequences.", _draw(result), columns=2)],
    )
