"""What the parts found: one page in Markdown with a picture of every plot, or in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from rich.text import Text

from bench.papers.part import Plot, Section
from bench.table import console, markdown
from bench.table import show as show_tables

_INTRODUCTION = """# Two papers, tried with msrnn_ops

A transformer keeps every token it has read, so its memory grows with the text and every new token
costs more than the one before. A recurrent network keeps a state of fixed size. Two papers bring
the two together, and msrnn_ops is a set of fused PyTorch operators for both.

“Were RNNs All We Needed?” (Feng et al. 2024, arXiv 2410.01201) takes from the GRU and the LSTM the
gates that look at the previous state. What is left, minGRU and minLSTM, is a linear recurrence,
which a scan computes for all time steps at once: training is parallel like a transformer's, and
writing needs one state. The operators are `ms.min_gru` and `ms.min_lstm`.

“Transformers are Multi-State RNNs” (Oren et al. 2024, arXiv 2401.06104) looks at a trained
transformer as an RNN whose state has as many vectors as there were tokens, and bounds it to N:
after every token one state goes. Which one is a policy; TOVA drops the state that the current token
attends to least. The operators are `ms.attend_evict`, `ms.attend_prompt` and `ms.attend_sequence`.

Each section says what the paper found, what was found here, and what of it can be compared.
"""


def _draw(plot: Plot, path: Path) -> None:
    pyplot.rcParams.update({"font.size": 10, "lines.linewidth": 1.8, "lines.markersize": 4})
    figure, axes = pyplot.subplots(
        1, plot.columns, figsize=(5.6 * plot.columns, 4.4), layout="constrained", squeeze=False
    )
    for one in axes[0]:
        one.grid(color="#e4e4e4", linewidth=0.7)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    plot.draw(axes[0])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _said(section: Section) -> dict[str, str]:
    return {
        "The paper": section.claim,
        "Here": section.found,
        "What can be compared": section.comparable,
    }


def chapter(section: Section) -> str:
    """A part's sentences and tables."""
    said = [f"**{term}.** {text}" for term, text in _said(section).items()]
    return "\n\n".join([f"## {section.title}", *said, *map(markdown, section.tables)])


def _machine(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    seconds = results["seconds_taken"]
    took = "in several runs" if seconds is None else f"{seconds:.0f} s"
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {versions['torch']}, "
        f"Python {versions['python']}; {results['date']}; `{results['command']}`, "
        f"{took}."
    )


def write(
    sections: Mapping[str, Section], results: Mapping[str, Mapping[str, Any]], folder: Path
) -> Path:
    """papers.md and a PNG of every plot."""
    parts = [_INTRODUCTION]
    for name, section in sections.items():
        parts += [chapter(section), _machine(results[name])]
        for plot in section.plots:
            file = f"papers-{name}-{plot.name}.png"
            _draw(plot, folder / file)
            parts.append(f"![{plot.caption}]({file})")
    page = folder / "papers.md"
    page.write_text("\n\n".join(parts) + "\n", "utf-8")
    return page


def show(sections: Mapping[str, Section]) -> None:
    for section in sections.values():
        console().rule(Text(section.title, style="bold"), align="left")
        for term, text in _said(section).items():
            console().print(Text(f"{term}: ", style="bold").append(text, style="not bold"))
        show_tables(*section.tables)
