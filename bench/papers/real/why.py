"""Why TOVA is where it is: its score, what it protects, the weights, the first token.

TOVA and H2O differ in two things: whose attention counts, the last query's or that of all queries
so far, and how many recent tokens are safe from it, none or half of the state. Both are varied
here alone, with and without four first tokens. Then the weights are rounded further, and texts are
read without the token that begins one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import msrnn_ops as ms
from bench.papers.checkpoint import Checkpoint
from bench.papers.part import Options, Plot, Section, Store
from bench.papers.real.intervals import difference, percent, perplexity, say_perplexity
from bench.papers.real.perplexity import POLICIES, bounded, full
from bench.papers.real.subject import subject
from bench.table import Table, number

_LENGTH, _EXCERPTS = 2048, 12
_SIZES = (64, 256)
_SHARES = (0, 1, 2, 3)  # quarters of the state that the most recent tokens take
_SCORES = {"attention": "the last query's", "accumulated": "all queries'"}
_SINKS = 4
_BITS = (8, 4, 3)
_BLOCK = 32  # weights with a scale of their own, as in the file
_COMPARED = ("TOVA-layer", "H2O-layer", "Window+4")
_COMPARED_AT = 256


def _varied() -> list[tuple[str, int, int]]:
    """Scores, quarters for the most recent tokens, and first tokens that stay."""
    plain = [(score, share, 0) for score in _SCORES for share in _SHARES]
    return plain + [(score, share, _SINKS) for score in _SCORES for share in (0, 2)]


def policy(score: str, share: int, sinks: int, slots: int) -> ms.Policy:
    return ms.Policy(slots, score, sinks, min(slots * share // 4, slots - sinks))


@torch.no_grad()
def rounded(model: Checkpoint, bits: int) -> Checkpoint:
    """A copy whose layers' weights have so many bits, and a scale for each block of a row."""
    found = copy.copy(model)
    found.model = copy.deepcopy(model.model)
    for module in found.model.model.modules():
        if isinstance(module, nn.Linear):
            block = math.gcd(module.in_features, _BLOCK)
            blocks = module.weight.float().unflatten(1, (-1, block))
            most = 2 ** (bits - 1) - 1
            scale = blocks.abs().amax(-1, keepdim=True) / most
            steps = (blocks / scale.clamp_min(1e-12)).round().clamp(-most, most)
            module.weight.copy_((steps * scale).flatten(1))
    return found


def _compared(
    store: Store, key: str, model: Checkpoint, rows: Tensor, slots: int
) -> dict[str, list[float]]:
    """The losses of the full state and of three policies."""
    length = rows.shape[1] - 1
    at = str(length)
    found = {"full": store.once(f"{key} full", full, model, rows, [length])["losses"][at]}
    say_perplexity(f"{key}, full state", found["full"])
    for name in _COMPARED:
        of_it = store.once(f"{key} {name}", bounded, model, rows, [length], POLICIES[name](slots))
        found[name] = of_it["losses"][at]
        say_perplexity(f"{key}, {name}, {slots} states", found[name])
    return found


def run(options: Options, store: Store) -> dict[str, Any]:
    length, number_of = _LENGTH, _EXCERPTS
    sizes: tuple[int, ...] = _SIZES
    if options.quick:
        length, number_of, sizes = 256, 2, (32,)
    of = subject("smollm2", options, torch.bfloat16)
    length = of.fitting(length)
    excerpts = of.excerpts(length, number_of)
    factors = []
    for score, share, sinks in _varied():
        for slots in sizes:
            one = policy(score, share, sinks, slots)
            key = f"{score} {share} {sinks} {slots}"
            found = store.once(key, bounded, of.model, excerpts.rows, [length], one)
            losses = found["losses"][str(length)]
            say_perplexity(f"{one}", losses)
            factors.append(
                {"score": score, "share": share, "sinks": sinks, "slots": slots, "losses": losses}
            )
    slots = min(_COMPARED_AT, length // 8)
    compare = partial(_compared, store, slots=slots)
    weights = {"as in the file": compare("as it is", of.model, excerpts.rows)}
    for bits in _BITS:
        coarse = rounded(of.model, bits)
        weights[f"{bits} bits"] = compare(f"{bits} bits", coarse, excerpts.rows)
    starts = {"with the token that begins a text": weights["as in the file"]}
    if of.model.start_token is not None:
        rows = excerpts.rows[:, 1:]
        starts["without it"] = compare("no start", of.model, rows)
    return {
        "subject": of.facts,
        "excerpts": excerpts.names,
        "length": length,
        "factors": factors,
        "slots": slots,
        "weights": weights,
        "starts": starts,
    }


def _at(result: Mapping[str, Any], slots: int, **of: Any) -> list[float]:
    """The losses of one combination."""
    for one in result["factors"]:
        if one["slots"] == slots and all(one[key] == value for key, value in of.items()):
            losses: list[float] = one["losses"]
            return losses
    raise KeyError(of)


def _sizes(result: Mapping[str, Any]) -> list[int]:
    return sorted({one["slots"] for one in result["factors"]})


_TOVA = {"score": "attention", "share": 0, "sinks": 0}
_H2O = {"score": "accumulated", "share": 2, "sinks": 0}


def _factor_table(result: Mapping[str, Any]) -> Table:
    sizes = _sizes(result)
    rows = []
    for score, share, sinks in _varied():
        cells = []
        for slots in sizes:
            found = _at(result, slots, score=score, share=share, sinks=sinks)
            cells.append(percent(difference(_at(result, slots, **_TOVA), found)))
        known = {(0, "attention"): " (TOVA)", (2, "accumulated"): " (H2O)"}.get((share, score), "")
        label = f"{_SCORES[score]}{known if not sinks else ''}"
        rows.append([label, f"{share}/4", f"{sinks}", *cells])
    return Table(
        "Score, recent and first tokens",
        "Percent of perplexity above TOVA's, with 95 % intervals; whose attention counts, what "
        "share of the state the most recent tokens have for themselves, and how many first tokens "
        "stay.",
        ("whose attention", "recent", "first", *(f"{slots} states" for slots in sizes)),
        rows,
        labels=3,
    )


def _compared_table(title: str, note: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, losses in found.items():
        tova = losses["TOVA-layer"]
        rows.append(
            [
                name,
                number(perplexity(losses["full"]), 4),
                percent(difference(losses["full"], tova)),
                *(percent(difference(tova, losses[x])) for x in _COMPARED[1:]),
            ]
        )
    columns = ("", "full state", "TOVA over it", *(f"{x} over TOVA" for x in _COMPARED[1:]))
    return Table(title, note, columns, rows)


def _draw_factors(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for slots, one in zip(_sizes(result), axes, strict=True):
        ends = [0.0]  # of the intervals; without room for recent tokens a sum is far above
        for score, words in _SCORES.items():
            found = [
                difference(
                    _at(result, slots, **_TOVA),
                    _at(result, slots, score=score, share=share, sinks=0),
                )
                for share in _SHARES
            ]
            bars = [
                [100 * (x[0] - x[1]) for x in found],
                [100 * (x[2] - x[0]) for x in found],
            ]
            middle = [100 * x[0] for x in found]
            one.errorbar(_SHARES, middle, bars, marker="o", capsize=2, label=words)
            ends += [100 * end for x in found[1:] for end in x[1:]]
        one.set_ylim(min(ends) - 2, max(ends) + 2)
        one.axhline(0, color="#222", linewidth=1)
        one.set_xticks(_SHARES, [f"{share}/4" for share in _SHARES])
        one.set_title(f"{slots} states")
        one.set_xlabel("share of the state for the most recent tokens")
        one.set_ylabel("% above TOVA's perplexity")
    axes[-1].legend(frameon=False, title="whose attention counts")


def _effect(result: Mapping[str, Any], slots: int, **change: Any) -> str:
    """What one change of TOVA does."""
    return percent(
        difference(_at(result, slots, **_TOVA), _at(result, slots, **{**_TOVA, **change}))
    )


def section(result: Mapping[str, Any]) -> Section:
    said = []
    for slots in _sizes(result):
        h2o = percent(difference(_at(result, slots, **_TOVA), _at(result, slots, **_H2O)))
        said.append(
            f"With {slots} states, in percent of TOVA's perplexity: H2O {h2o}; TOVA with half of "
            f"the state for recent tokens {_effect(result, slots, share=2)}; TOVA by the attention "
            f"of all queries {_effect(result, slots, score='accumulated')}; TOVA with four first "
            f"tokens {_effect(result, slots, sinks=_SINKS)}."
        )
    slots = result["slots"]
    return Section(
        title="Why the policies are in this order",
        claim=(
            "TOVA lets the last query decide alone, and keeps recent tokens only where it wants "
            "them; the paper finds that no part of the state need be set aside."
        ),
        found=" ".join(said),
        comparable=(
            "One model and its texts, as above. A larger model of the same family and one without "
            "instruction tuning are not in the registry, so neither is separated here."
        ),
        tables=[
            _factor_table(result),
            _compared_table(
                "Coarser weights",
                f"All weights of the layers rounded further; {slots} states; percent.",
                result["weights"],
            ),
            _compared_table(
                "The token that begins a text",
                f"It draws much attention; {slots} states; percent.",
                result["starts"],
            ),
        ],
        plots=[
            Plot(
                "factors",
                "What the score and the room for recent tokens change, with 95 % intervals. By all "
                "queries' attention and without such room the perplexity is far above.",
                partial(_draw_factors, result),
                columns=len(_sizes(result)),
            )
        ],
    )
