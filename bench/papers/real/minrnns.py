"""minRNNs on the books that the pretrained models read: characters and bytes, over three seeds.

The last tenth of each book is held out. SmolLM2 reads the same tenths, for a measure of what bits a
character can come down to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from bench.papers import characters
from bench.papers.part import Options, Plot, Section, Store
from bench.papers.real.subject import SHORTEST, Subject, subject
from bench.papers.words import Characters
from bench.table import Table, say

_SETTING = characters.Setting(128, 2, 128, 16, 300, 3e-3, 50, 192, 0.0)
_SEEDS = (0, 1, 2)
_PAPER = ("minGRU", "minLSTM", "transformer")
_KINDS = {"characters": (*_PAPER, "GRU", "LSTM"), "bytes": _PAPER}
_HELD_OUT = 10  # the last tenth of every book
_CONTEXT, _EXCERPTS = 2048, 6  # of the pretrained model


def corpus(texts: Mapping[str, str], unit: str) -> Characters:
    """Books as numbers of characters, or as the bytes of UTF-8."""
    if unit == "bytes":
        alphabet = bytes(range(256)).decode("latin-1")
        books = [torch.tensor(list(text.encode())) for text in texts.values()]
    else:
        alphabet = "".join(sorted(set("".join(texts.values()))))
        index = {character: i for i, character in enumerate(alphabet)}
        books = [torch.tensor([index[x] for x in text]) for text in texts.values()]
    train, held_out = [], []
    for book in books:
        split = len(book) * (_HELD_OUT - 1) // _HELD_OUT
        train.append(book[:split])
        held_out.append(book[split:])
    return Characters(", ".join(texts), alphabet, torch.cat(train), torch.cat(held_out))


def _trained(kind: str, of: Characters, setting: characters.Setting, device: str, seed: int) -> Any:
    found = characters.train(setting, kind, of, device, seed)
    return {key: found[key] for key in ("curve", "parameters", "width")}


@torch.no_grad()
def pretrained(of: Subject, length: int) -> float | None:
    """Bits a character of the held-out tenths, each token predicted by those of its excerpt.

    None: a tenth is too short for that.
    """
    tails = {name: text[-(len(text) // _HELD_OUT) :] for name, text in of.texts.items()}
    if min(len(of.model.encode(tail)) for tail in tails.values()) <= SHORTEST:
        return None
    held_out = Subject(of.model, tails, of.facts)
    excerpts = held_out.excerpts(held_out.fitting(length), _EXCERPTS)
    nats, read = 0.0, 0
    for row in excerpts.rows:
        losses: Tensor = of.model.losses(row[None])[0]
        half = len(losses) // 2  # the first half is context alone
        nats += float(losses[half:].double().sum())
        read += len(of.model.tokenizer.decode(row[half + 1 :].tolist()))
    return nats / read / math.log(2)


def run(options: Options, store: Store) -> dict[str, Any]:
    setting, context = _SETTING, _CONTEXT
    seeds: Sequence[int] = _SEEDS
    if options.quick:
        setting = characters.Setting(32, 1, 64, 8, 20, 3e-3, 10, 16, 0.0)
        seeds, context = _SEEDS[:2], 256
    of = subject("smollm2", options, torch.bfloat16)
    bits = store.once("pretrained", pretrained, of, context)
    if bits is not None:
        say(f"{of.facts['checkpoint']['name']}: {bits:.3f} bits a character")
    found: dict[str, dict[str, Any]] = {}
    for unit, kinds in _KINDS.items():
        books = corpus(of.texts, unit)
        for kind in kinds:
            train = partial(_trained, kind, books, setting, options.device)
            found.setdefault(unit, {})[kind] = [
                store.once(f"{unit} {kind} {seed}", train, seed) for seed in seeds
            ]
            say(f"{unit}, {kind}: {_lowest(found[unit][kind])} bits")
    return {
        "subject": of.facts,
        "setting": vars(setting),
        "seeds": seeds,
        "pretrained_bits": bits,
        "models": found,
    }


def _bits(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """The lowest held-out loss of each seed."""
    return [min(point["value"] for point in one["curve"]) / math.log(2) for one in runs]


def _lowest(runs: Sequence[Mapping[str, Any]]) -> str:
    bits = _bits(runs)
    return f"{statistics.mean(bits):.3f} ± {statistics.stdev(bits):.3f}"


def _seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    """Of a step, by the median."""
    return statistics.median(point["step_seconds"] for one in runs for point in one["curve"])


def _table(result: Mapping[str, Any], unit: str) -> Table:
    rows = [
        [
            kind,
            f"{runs[0]['parameters']:,}",
            str(runs[0]["width"]),
            _lowest(runs),
            f"{1e3 * _seconds(runs):.1f}",
        ]
        for kind, runs in result["models"][unit].items()
    ]
    setting = result["setting"]
    return Table(
        f"Held-out loss, {unit}",
        f"Bits for one of the {unit}, mean and standard deviation over {len(result['seeds'])} "
        f"seeds; depth {setting['layers']}, {setting['steps']:,} steps of {setting['batch']} × "
        f"{setting['context']}; widths for equal parameters.",
        ("model", "parameters", "width", "bits", "ms a step"),
        rows,
    )


def _draw(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for (unit, models), one in zip(result["models"].items(), axes, strict=True):
        for kind, runs in models.items():
            curves = [[point["value"] / math.log(2) for point in x["curve"]] for x in runs]
            steps = [point["step"] for point in runs[0]["curve"]]
            middle = [statistics.mean(x) for x in zip(*curves, strict=True)]
            spread = [statistics.stdev(x) for x in zip(*curves, strict=True)]
            one.errorbar(steps, middle, spread, capsize=2, label=kind)
        one.set_title(unit)
        one.set_xlabel("training steps")
        one.set_ylabel("held-out bits")
    axes[-1].legend(frameon=False)


def section(result: Mapping[str, Any]) -> Section:
    said = []
    for unit, models in result["models"].items():
        bits = ", ".join(f"{kind} {_lowest(runs)}" for kind, runs in models.items())
        said.append(f"{unit}: {bits}")
    found = f"Held-out bits, {'; '.join(said)}."
    if result["pretrained_bits"] is not None:
        checkpoint = result["subject"]["checkpoint"]
        found += (
            f" {checkpoint.get('title', checkpoint['name'])} needs {result['pretrained_bits']:.3f} "
            "bits a character of the same parts."
        )
    return Section(
        title="minRNNs on the same books",
        claim="minGRU (test loss 1.548), minLSTM (1.555) and a transformer (1.547) end level.",
        found=found,
        comparable=(
            "So few parameters and steps show the order and its noise, not what such models can "
            "reach; the pretrained one may have seen the books."
        ),
        tables=[_table(result, unit) for unit in result["models"]],
        plots=[
            Plot(
                "loss",
                "Held-out bits against training steps, with the spread of the seeds.",
                partial(_draw, result),
                columns=len(result["models"]),
            )
        ],
    )
