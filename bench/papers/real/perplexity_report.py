"""What perplexity.py found: its sentences, tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from bench.papers.part import Plot, Section
from bench.papers.real.intervals import difference, percent, perplexity
from bench.table import Table, number

_REFERENCE = "TOVA-layer"  # what the others are compared to
_PAPER = (
    "LLaMA-2-7B on PG-19, 4,096 tokens: with 512 states TOVA is 0.25 above the full model's 7.16 "
    "(3.5 %), and ahead of H2O and of windows with and without first tokens at all sizes."
)


def _losses(result: Mapping[str, Any], name: str, slots: int, length: int) -> list[float]:
    found: list[float] = result["policies"][name][str(slots)]["losses"][str(length)]
    return found


def _sizes(result: Mapping[str, Any], length: int) -> list[int]:
    return [int(slots) for slots in result["policies"][_REFERENCE] if int(slots) < length]


def _table(result: Mapping[str, Any], length: int) -> Table:
    sizes = _sizes(result, length)
    rows = [
        [name, *(number(perplexity(_losses(result, name, n, length)), 4) for n in sizes)]
        for name in result["policies"]
    ]
    whole = result["full"]["losses"][str(length)]
    return Table(
        f"Perplexity of {length:,} tokens",
        f"By the number of states; the full state has {number(perplexity(whole), 4)}.",
        ("policy", *(f"{slots:,}" for slots in sizes)),
        rows,
    )


def _differences(result: Mapping[str, Any], length: int) -> Table:
    sizes = _sizes(result, length)
    rows = [
        [
            f"{_REFERENCE}, over the full state",
            *(
                percent(
                    difference(
                        result["full"]["losses"][str(length)],
                        _losses(result, _REFERENCE, slots, length),
                    )
                )
                for slots in sizes
            ),
        ]
    ]
    for name in result["policies"]:
        if name != _REFERENCE:
            cells = []
            for slots in sizes:
                ours, theirs = (_losses(result, x, slots, length) for x in (_REFERENCE, name))
                cells.append(percent(difference(ours, theirs)))
            rows.append([f"{name}, over {_REFERENCE}", *cells])
    return Table(
        f"Differences in percent, {length:,} tokens",
        "How much higher a perplexity is, with a 95 % interval by a paired bootstrap over "
        f"{len(result['excerpts'])} excerpts. Below 0: better than {_REFERENCE}.",
        ("", *(f"{slots:,}" for slots in sizes)),
        rows,
    )


def _first_four(result: Mapping[str, Any]) -> Table:
    sizes = _sizes(result, result["lengths"][-1])
    rows = []
    for name, at in result["policies"].items():
        shares = [at[str(slots)]["first_four_kept"] for slots in sizes]
        rows.append([name, *(" ".join(f"{x:.0%}" for x in four) for four in shares)])
    return Table(
        "First tokens kept",
        "In what share of the layers and heads the first, second, third and fourth token are still "
        f"there after {result['lengths'][-1]:,}.",
        ("policy", *(f"{slots:,}" for slots in sizes)),
        rows,
    )


def _style(policy: str) -> str:
    return {"TOVA": "-", "H2O": "--"}.get(policy.partition("-")[0], ":")


def _draw_differences(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for length, one in zip(result["lengths"], axes, strict=True):
        sizes = _sizes(result, length)
        whole = result["full"]["losses"][str(length)]
        for i, name in enumerate(result["policies"]):
            found = [difference(whole, _losses(result, name, n, length)) for n in sizes]
            middle = [100 * x[0] for x in found]
            bars = [[100 * (x[0] - x[1]) for x in found], [100 * (x[2] - x[0]) for x in found]]
            at = [n * 1.02 ** (i - 2) for n in sizes]  # side by side
            one.errorbar(at, middle, bars, fmt=_style(name), marker="o", capsize=2, label=name)
        one.set_xscale("log", base=2)
        one.set_xticks(sizes, [str(n) for n in sizes])
        one.set_yscale("symlog", linthresh=10)
        one.set_ylim(bottom=-1)
        one.set_yticks([0, 2, 5, 10, 20, 50, 100], ["0", "2", "5", "10", "20", "50", "100"])
        one.set_title(f"{length:,} tokens")
        one.set_xlabel("states")
        one.set_ylabel("% above the full state's perplexity")
    axes[-1].legend(frameon=False, fontsize=9)


def _middle(result: Mapping[str, Any]) -> int:
    """The size that curves are shown at."""
    sizes = _sizes(result, result["lengths"][-1])
    return sizes[len(sizes) // 2]


def _draw_course(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    slots, whole = _middle(result), result["full"]["course"]
    length = result["lengths"][-1]
    at = [length * (i + 0.5) / len(whole) for i in range(len(whole))]
    for name, found in result["policies"].items():
        course = found[str(slots)]["course"]
        lost = [y - x for x, y in zip(whole, course, strict=True)]
        if max(lost) < 1:  # a plain window is far above
            axes[0].plot(at, lost, _style(name), label=name)
        axes[1].plot(at, found[str(slots)]["kept"], _style(name), label=name)
    axes[0].set_ylabel("nats above the full state's loss")
    axes[1].set_ylabel("share kept at the end")
    for one in axes:
        one.set_xlabel("position in the text")
    axes[1].legend(frameon=False, fontsize=9)


def verdict(result: Mapping[str, Any]) -> str:
    """Whether TOVA's claim holds: how many of the comparisons are sure, and which way."""
    said = []
    for length in result["lengths"]:
        better, worse = [], []
        for name in result["policies"]:
            if name == _REFERENCE or name.startswith("TOVA"):
                continue
            for slots in _sizes(result, length):
                ours, theirs = (_losses(result, x, slots, length) for x in (_REFERENCE, name))
                _, low, high = difference(ours, theirs)
                better += [f"{name} at {slots}"] * (low > 0)
                worse += [f"{name} at {slots}"] * (high < 0)
        said.append(
            f"On {length:,} tokens {_REFERENCE} is surely better than {_listed(better)}, and surely"
            f" worse than {_listed(worse)}."
        )
    return " ".join(said)


def _listed(names: Sequence[str]) -> str:
    """Policies, each with its sizes."""
    if not names:
        return "none"
    sizes: dict[str, list[str]] = {}
    for name in names:
        policy, _, slots = name.partition(" at ")
        sizes.setdefault(policy, []).append(slots)
    return "; ".join(f"{policy} (at {', '.join(at)})" for policy, at in sizes.items())


def section(result: Mapping[str, Any]) -> Section:
    subject, lengths = result["subject"], result["lengths"]
    texts = ", ".join(dict.fromkeys(result["excerpts"]))
    name = subject["checkpoint"].get("title", subject["checkpoint"]["name"])
    return Section(
        title=f"{name}: perplexity with a bounded state",
        claim=_PAPER,
        found=verdict(result),
        comparable=(
            f"The policies and the way they act, after every token, are the paper's. The model is "
            f"another one, of {subject['parameters']:,} parameters, in {subject['dtype']}; the "
            f"texts are {len(result['excerpts'])} excerpts of {texts}."
        ),
        tables=[
            table
            for length in lengths
            for table in (_table(result, length), _differences(result, length))
        ]
        + [_first_four(result)],
        plots=(
            Plot(
                "differences",
                "How far a bounded state is above the full one, with 95 % intervals.",
                partial(_draw_differences, result),
                columns=len(lengths),
            ),
            Plot(
                "course",
                f"{_middle(result):,} states. Left: where in the text a policy loses. Right: which "
                "positions are left at its end.",
                partial(_draw_course, result),
                columns=2,
            ),
        ),
    )
