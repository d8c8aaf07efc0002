"""A language model of characters: the paper's Figure 2, held-out loss against training steps.

minGRU and minLSTM then write text one character at a time through their step form, which must agree
with the parallel one.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.papers.models import CELLS, SequenceModel, fit, parameters
from bench.papers.part import Options, Plot, Section, Store
from bench.papers.words import Characters, characters_of
from bench.table import Table

NAME = "characters"
PAPER = {"minGRU": 1.548, "minLSTM": 1.555, "transformer": 1.547}  # lowest test loss, section 4.2
_KINDS = ("minGRU", "minLSTM", "transformer", "GRU", "LSTM")
_PROMPT, _WRITTEN = 64, 200  # characters
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Setting:
    width: int  # of the transformer; the others get as many parameters
    layers: int
    context: int
    batch: int
    steps: int
    rate: float
    every: int
    held_out: int  # windows
    dropout: float
    expansion: float = 1.0
    conv: int = 4


QUICK = Setting(96, 2, 128, 16, 400, 3e-3, 50, 96, 0.0)
FULL = Setting(384, 6, 256, 64, 5000, 1e-3, 100, 400, 0.2, expansion=2.0)


def _build(setting: Setting, kind: str, characters: int, width: int) -> SequenceModel:
    return SequenceModel(
        kind,
        nn.Embedding(characters, width),
        width,
        setting.layers,
        characters,
        expansion=setting.expansion,
        conv=setting.conv,
        dropout=setting.dropout,
    )


def _width(setting: Setting, kind: str, characters: int) -> int:
    """The width that gives a kind about as many parameters as the transformer has."""

    def count(kind: str, width: int) -> int:
        with torch.device("meta"):
            return parameters(_build(setting, kind, characters, width))

    if kind == "transformer":
        return setting.width
    goal, widths = count("transformer", setting.width), range(8, 2 * setting.width, 4)
    above = bisect.bisect_left(widths, goal, key=lambda width: count(kind, width))
    return min(widths[above - 1 : above + 1], key=lambda width: abs(count(kind, width) - goal))


def train(
    setting: Setting, kind: str, corpus: Characters, device: str, seed: int = 0
) -> dict[str, Any]:
    torch.manual_seed(seed)
    width = _width(setting, kind, len(corpus.characters))
    model = _build(setting, kind, len(corpus.characters), width).to(device)
    generator = torch.Generator().manual_seed(seed + 1)
    windows = corpus.train.unfold(0, setting.context + 1, 1)
    held_out = corpus.held_out.unfold(0, setting.context + 1, setting.context)
    held_out = held_out[: setting.held_out].to(device)

    def loss_of(windows: Tensor) -> Tensor:
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def loss() -> Tensor:
        chosen = torch.randint(len(windows), (setting.batch,), generator=generator)
        return loss_of(windows[chosen].to(device))

    def evaluate() -> float:
        parts = held_out.split(setting.batch)
        return sum(float(loss_of(part)) * len(part) for part in parts) / len(held_out)

    curve = fit(
        model,
        loss,
        evaluate,
        steps=setting.steps,
        rate=setting.rate,
        every=setting.every,
        label=f"characters  {kind}",
    )
    step_seconds = statistics.median(point["step_seconds"] for point in curve)
    found: dict[str, Any] = {"curve": curve, "width": width, "parameters": parameters(model)}
    found["step_seconds"] = step_seconds
    if kind in CELLS:
        text = corpus.held_out[: setting.context].to(device)
        found["step_difference"] = _step_difference(model, text)
        written, found["written_per_second"] = _write(model, text[:_PROMPT])
        found["prompt"] = corpus.spell(text[:_PROMPT].tolist())
        found["written"] = corpus.spell(written)
    return found


def _steps(model: SequenceModel, tokens: Tensor) -> tuple[Tensor, list[Any]]:
    """Logits (1, T, characters) of tokens (T,) by the step form, and the states after them."""
    states: list[Any] = [None] * len(model.blocks)
    logits = []
    for token in tokens:
        one, states = model.step(token[None], states)
        logits.append(one)
    return torch.stack(logits, 1), states


@torch.no_grad()
def _step_difference(model: SequenceModel, tokens: Tensor) -> float:
    """The largest difference between the logits of the step form and of the parallel form."""
    model.eval()
    return float((_steps(model, tokens)[0] - model(tokens[None])).abs().max())


@torch.no_grad()
def _write(model: SequenceModel, prompt: Tensor) -> tuple[list[int], float]:
    """Characters that follow the prompt, one at a time, and how many a second."""
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(2)
    logits, states = _steps(model, prompt)
    last, written = logits[:, -1], []
    start = time.perf_counter()
    for _ in range(_WRITTEN):
        odds = (last[0] / _TEMPERATURE).softmax(0)
        token = torch.multinomial(odds, 1, generator=generator)
        written.append(int(token))
        last, states = model.step(token, states)
    return written, _WRITTEN / (time.perf_counter() - start)


def run(options: Options, store: Store) -> dict[str, Any]:
    setting = FULL if options.full else QUICK
    corpus = characters_of(options.text)
    if len(corpus.held_out) <= setting.context:
        raise ValueError(f"the text is too short: the last tenth has {len(corpus.held_out)}")
    models = {
        kind: store.once(kind, train, setting, kind, corpus, options.device) for kind in _KINDS
    }
    return {
        "setting": vars(setting),
        "text": corpus.name,
        "length": len(corpus.train) + len(corpus.held_out),
        "vocabulary": len(corpus.characters),
        "models": models,
    }


def _falling(model: dict[str, Any]) -> str:
    """The loss in training, at five of the points of the curve."""
    curve = model["curve"]
    picks = [curve[round(part * (len(curve) - 1) / 4)] for part in range(5)]
    return " → ".join(f"{point['loss']:.2f}" for point in picks)


def _lowest(model: dict[str, Any]) -> float:
    return min(point["value"] for point in model["curve"])


def _steps_to(model: dict[str, Any], loss: float) -> int:
    """The first evaluated step at which the held-out loss is no more than `loss`."""
    return next(point["step"] for point in model["curve"] if point["value"] <= loss)


def _draw(models: dict[str, Any]) -> Callable[[Sequence[Axes]], None]:
    def onto(axes: Sequence[Axes]) -> None:
        for kind, model in models.items():
            points = [(point["step"], point["value"]) for point in model["curve"]]
            axes[0].plot(*zip(*points, strict=True), label=kind)
            seconds = [step * model["step_seconds"] for step, _ in points]
            axes[1].plot(seconds, [value for _, value in points], label=kind)
        axes[0].set(xlabel="training steps", ylabel="held-out loss (nats per character)")
        axes[1].set(xlabel="seconds of training, by the median step")
        axes[0].legend(frameon=False)

    return onto


def section(result: dict[str, Any]) -> Section:
    setting, models = result["setting"], result["models"]
    reached = max(_lowest(model) for model in models.values())
    rows = [
        [
            kind,
            f"{model['parameters']:,}",
            str(model["width"]),
            _falling(model),
            f"{_lowest(model):.3f}",
            f"{_lowest(model) / math.log(2):.3f}",
            f"{_steps_to(model, reached):,}",
            f"{1e3 * model['step_seconds']:.1f}",
            f"{setting['batch'] * setting['context'] / model['step_seconds']:,.0f}",
            f"{model['step_difference']:.0e}" if "step_difference" in model else "",
            f"{model['written_per_second']:,.0f}" if "written_per_second" in model else "",
            f"{PAPER[kind]:.3f}" if kind in PAPER else "",
        ]
        for kind, model in models.items()
    ]
    ratio = _steps_to(models["transformer"], reached) / _steps_to(models["minGRU"], reached)
    lowest = {kind: _lowest(model) for kind, model in models.items()}
    return Section(
        title="A language model of characters",
        claim="On Shakespeare's plays minGRU (test loss 1.548), minLSTM (1.555) and a transformer "
        "(1.547) end level, and the transformer takes about 2.5 times the steps to get there.",
        found=f"After {setting['steps']:,} steps on {result['text']}: "
        + ", ".join(f"{kind} {loss:.3f}" for kind, loss in lowest.items())
        + f" nats per character; to {reached:.3f}, which all reach, the transformer takes "
        f"{ratio:.1f} times minGRU's steps.",
        comparable="The order and the ratio of steps compare; the losses themselves only on the "
        "same text (tiny_shakespeare, given by --text) with --full, whose width, layers, context, "
        "batch and steps are those of the usual small GPT on that text.",
        tables=[
            Table(
                "Held-out loss",
                f"Lowest loss on the held-out tenth, {setting['held_out']} windows of "
                f"{setting['context']} characters; {setting['layers']} layers; widths for equal "
                f"parameters; steps to a loss of {reached:.3f}. In training: nats per character. "
                "The step form: the largest difference of its logits from the parallel form's, and "
                "how many characters it writes in a second.",
                (
                    "model",
                    "parameters",
                    "width",
                    "in training",
                    "nats",
                    "bits",
                    "steps to it",
                    "ms a step",
                    "tokens/s",
                    "step form",
                    "written/s",
                    "paper (nats)",
                ),
                rows,
            )
        ],
        plots=[Plot("loss", "Held-out loss against steps and time.", _draw(models), columns=2)],
    )
