"""What the part states shows: its sentences, tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes

from bench.papers.part import Plot, Section
from bench.table import Table, number


def _eighth(result: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """An eighth of the context, and the perplexity of every policy there."""
    slots = str(result["subject"]["context"] // 8)
    policies = result["perplexity"]["policies"]
    return slots, {name: at[slots] for name, at in policies.items()}


def verdict(result: Mapping[str, Any]) -> str:
    """Whether TOVA-layer is the best of what the paper compares it to, at an eighth."""
    slots, at = _eighth(result)
    full, tova = result["perplexity"]["full"], at["TOVA-layer"]
    rivals = ("Window+4", "H2O-head", "H2O-layer")
    better = [name for name in rivals if at[name] < tova]
    said = (
        f"With {slots} of {result['subject']['context']} states TOVA-layer has perplexity "
        f"{tova:.2f}, the full state {full:.2f}, Window {at['Window']:.2f}, Window+4 "
        f"{at['Window+4']:.2f}, H2O-head {at['H2O-head']:.2f} and H2O-layer {at['H2O-layer']:.2f}: "
    )
    if not better:
        return said + "as in the paper, none of them is better than TOVA-layer."
    best = min(rivals, key=at.__getitem__)
    lost, lost_best = result["forgotten"]["TOVA-layer"], result["forgotten"][best]
    why = (
        "it drops more of what later tokens look for"
        if lost > lost_best
        else "it drops no more of what later tokens look for, but that helps them less"
    )
    return (
        said + f"unlike in the paper, {' and '.join(better)} did better, by at most "
        f"{tova / at[best] - 1:.1%}. Of the attention that the full model pays, {lost:.1%} goes to "
        f"states that TOVA-layer has dropped, {lost_best:.1%} to those that {best} has: {why}. "
        f"All that lies behind the last {slots} tokens is worth {at['Window'] / full - 1:.1%} of "
        "perplexity to this model."
    )


def _recalled(found: Mapping[str, Any]) -> str:
    """The longest distance, after a prompt."""
    at = {name: right[-1] for name, right in found["after_a_prompt"].items()}
    return (
        f"Facts {found['distances'][-1]} tokens behind, asked for by a prompt, are recalled with "
        f"{found['slots']} of {found['context']} states: full {found['full'][-1]:.0%}, TOVA-layer "
        f"{at['TOVA-layer']:.0%}, H2O-layer {at['H2O-layer']:.0%}, Window+4 {at['Window+4']:.0%}, "
        f"Window {at['Window']:.0%}."
    )


def _perplexity_table(result: Mapping[str, Any]) -> Table:
    found, subject = result["perplexity"], result["subject"]
    sizes = found["states"]
    rows = [
        [
            name,
            *(number(at[str(slots)], 4) for slots in sizes),
            number(found["full"], 4),
            f"{result['forgotten'][name]:.1%}",
        ]
        for name, at in found["policies"].items()
    ]
    return Table(
        "Perplexity against the number of states",
        f"{subject['name']}, {subject['parameters']:,} parameters; {subject['windows']} windows of "
        f"{subject['context']} held-out tokens of {subject['text']}. The policy acts after every "
        "token. Forgotten: what share of the full model's attention is paid to states that were "
        f"dropped at {subject['context'] // 8}. The paper, LLaMA-2-7B on PG-19: TOVA 7.41 at 512 "
        "of 4096 states, full 7.16, Window 2184.",
        ("policy", *(f"{slots}" for slots in sizes), f"{subject['context']}, full", "forgotten"),
        rows,
    )


def _kept_table(kept: Mapping[str, Any]) -> Table:
    stays = sorted(kept["stays"].items(), key=lambda item: -item[1][0])
    return Table(
        "Which tokens stay",
        f"TOVA-layer with {kept['slots']} states, last layer: for how much of the rest of the text "
        "a token of its first half is kept.",
        ("token", "kept for", "tokens"),
        [[kind, f"{share:.1%}", f"{count:,}"] for kind, (share, count) in stays],
    )


def _writing_table(writing: Mapping[str, Any]) -> Table:
    rows = [
        [
            name if not name.isdigit() else f"{name} states",
            f"{judged['tokens']}",
            f"{judged['tokens_a_paragraph']:.0f}",
            *(f"{judged[f'distinct_{n}']:.2f}" for n in (1, 2, 4)),
            number(judged["perplexity"]),
        ]
        for name, judged in writing["judged"].items()
    ]
    return Table(
        "Long texts, written with TOVA-layer",
        f"{writing['texts']} texts sampled at temperature 1 after prompts of {writing['prompt']} "
        "held-out tokens. Tokens written, and how many of them between blank lines; different "
        "n-grams over all n-grams; the perplexity of what was written under the model with its "
        "full state, in place of a judge.",
        ("", "tokens", "a paragraph", "distinct-1", "distinct-2", "distinct-4", "perplexity"),
        rows,
    )


_RECALL = {
    "token_by_token": "the policy after every token",
    "after_a_prompt": "once after a prompt with the question",
}


def _recall_table(found: Mapping[str, Any]) -> Table:
    rows = [["full", "", *(f"{x:.0%}" for x in found["full"])]]
    for key, way in _RECALL.items():
        rows += [[name, way, *(f"{x:.0%}" for x in right)] for name, right in found[key].items()]
    return Table(
        "Key-value recall",
        f"Right answers with {found['slots']} states (full: {found['context']}), by the number of "
        f"tokens between {found['facts']} facts and the question. Policies act after every token, "
        "where nothing asks for a fact before the end; or once, after a prompt that ends with the "
        "question, which is then asked again. A decoder of its own, trained with its full state.",
        ("policy", "acts", *(f"{distance}" for distance in found["distances"])),
        rows,
        labels=2,
    )


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    full = rows[-1]["tokens_per_second"]
    cells = [
        [
            f"{row['slots']:,}",
            f"{row['batch']}",
            f"{row['bytes'] / 2**20:,.0f} MiB",
            number(row["tokens_per_second"]),
            f"{number(row['tokens_per_second'] / full, 2)}×",
        ]
        for row in rows
    ]
    return Table(
        "Throughput at one budget of memory",
        "Tokens a second at the largest batch whose states fit what the full state takes; "
        "whole decode steps. The paper, LLaMA-2-7B on a V100: 4.8× at an eighth.",
        ("states", "batch", "memory of the states", "tokens/s", "over the full state"),
        cells,
    )


def _style(policy: str) -> str:
    return {"TOVA": "-", "H2O": "--"}.get(policy.partition("-")[0], ":")


def _draw_perplexity(result: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    found = result["perplexity"]
    for name, at in found["policies"].items():
        axes[0].plot(found["states"], list(at.values()), _style(name), marker="o", label=name)
    axes[0].axhline(found["full"], color="#222", linewidth=1, label="full state")
    axes[0].set_xscale("log", base=2)
    seen = [perplexity for at in found["policies"].values() for perplexity in at.values()]
    if max(seen) > 10 * min(seen):
        axes[0].set_yscale("log")
    axes[0].set_xticks(found["states"], [str(slots) for slots in found["states"]])
    axes[0].set_xlabel("states")
    axes[0].set_ylabel("perplexity of held-out text")
    axes[0].legend(frameon=False, fontsize=9)


def _draw_kept(kept: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    expiry = torch.tensor(kept["expiry"])
    step = torch.arange(len(expiry))[:, None]
    visible = (step >= step.T) & (step < expiry)
    axes[0].grid(False)
    axes[0].imshow(visible.numpy(), cmap="Greys", aspect="auto", interpolation="nearest")
    axes[0].set_xlabel("position of a token")
    axes[0].set_ylabel("after so many tokens")
    stays = sorted(kept["stays"].items(), key=lambda item: item[1][0])
    axes[1].barh([kind for kind, _ in stays], [share for _, (share, _) in stays], color="#0b6e4f")
    axes[1].set_xlabel("share of the rest of the text for which it is kept")


def _draw_recall(found: Mapping[str, Any], axes: Sequence[Axes]) -> None:
    for (key, way), one in zip(_RECALL.items(), axes, strict=True):
        one.plot(found["distances"], found["full"], "-.", color="#222", label="full state")
        for name, right in found[key].items():
            one.plot(found["distances"], right, _style(name), marker="o", label=name)
        one.set_title(way)
        one.set_xlabel("tokens between the facts and the question")
        one.set_ylabel("right answers")
        one.set_ylim(0, 1.03)
    axes[-1].legend(frameon=False, fontsize=9)


def _comparable(subject: Mapping[str, Any]) -> str:
    if subject["trained_on"] is None:
        return (
            "Perplexities compare to the paper's as far as the checkpoint, the text and the "
            "context are the same; recall is of a small decoder, and throughput of this machine."
        )
    return (
        "The order of the policies compares to the paper's; the perplexities, of a decoder of "
        f"{subject['parameters']:,} parameters trained on {subject['trained_on']:,} tokens, and "
        "the throughput, of another machine and model, do not (--model measures a real checkpoint)."
    )


def section(result: Mapping[str, Any]) -> Section:
    subject, speed = result["subject"], result["speed"]
    gain = speed[0]["tokens_per_second"] / speed[-1]["tokens_per_second"]
    return Section(
        title="Transformers as multi-state RNNs: bounding the state",
        claim=(
            "A trained transformer needs few of its states: with TOVA and an eighth of them it is "
            "close to the full model (LLaMA-2-7B on PG-19: perplexity 7.41 against 7.16, a plain "
            "window 2184), ahead of H2O and of windows with attention sinks, and writes 4.8 times "
            "as many tokens a second on a V100."
        ),
        found=(
            f"{verdict(result)} {_recalled(result['recall'])} At one budget of memory an eighth "
            f"of the states gives {number(gain, 2)} times the throughput of the full state."
        ),
        comparable=_comparable(subject),
        tables=(
            _perplexity_table(result),
            _kept_table(result["kept"]),
            _writing_table(result["writing"]),
            _recall_table(result["recall"]),
            _speed_table(speed),
        ),
        plots=(
            Plot(
                "perplexity",
                "Perplexity of held-out text against the number of states.",
                partial(_draw_perplexity, result),
            ),
            Plot(
                "kept",
                f"TOVA-layer with {result['kept']['slots']} states, last layer. Left: which tokens "
                "are kept (dark) as the text goes on downwards. Right: which kinds stay.",
                partial(_draw_kept, result["kept"]),
                columns=2,
            ),
            Plot(
                "recall",
                f"Key-value recall with {result['recall']['slots']} states.",
                partial(_draw_recall, result["recall"]),
                columns=2,
            ),
        ),
    )
