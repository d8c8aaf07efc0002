"""The page of all parts: one self-contained HTML file, PNGs, and the same in a terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from rich.text import Text

from bench.papers.part import Plot, Section
from bench.table import Table, console
from bench.table import show as show_tables

_INTRODUCTION = (
    "A transformer keeps every token it has read, so its memory grows with the text and every new "
    "token costs more than the one before. A recurrent network keeps a state of fixed size. Two "
    "papers bring the two together, and msrnn_ops is a set of fused PyTorch operators for both.",
    "“Were RNNs All We Needed?” (Feng et al. 2024, arXiv 2410.01201) takes from the GRU and the "
    "LSTM the gates that look at the previous state. What is left, minGRU and minLSTM, is a linear "
    "recurrence, which a scan computes for all time steps at once: training is parallel like a "
    "transformer's, and writing needs one state. The operators: ms.min_gru, ms.min_lstm.",
    "“Transformers are Multi-State RNNs” (Oren et al. 2024, arXiv 2401.06104) looks at a trained "
    "transformer as an RNN whose state has as many vectors as there were tokens, and bounds it to "
    "N: after every token one state goes. Which one is a policy; TOVA drops the state that the "
    "current token attends to least. The operators: ms.attend_evict, ms.attend_prompt, "
    "ms.attend_sequence.",
    "Each section says what the paper found, what was found here, and what of it can be compared.",
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; }
th { vertical-align: bottom; font-weight: 600; }
.label { text-align: left; }
img { max-width: 100%; }
figure { margin: 1.5rem 0; }
figcaption, .note { color: #666; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .6rem; }
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


def _cells(tag: str, cells: Any, labels: int) -> str:
    return "".join(
        f"<{tag}{' class=label' if i < labels else ''}>{escape(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )


def _table(table: Table) -> str:
    rows = "\n".join(f"<tr>{_cells('td', row, table.labels)}</tr>" for row in table.rows)
    return (
        f"<h3>{escape(table.title)}</h3>\n<p class=note>{escape(table.note)}</p>\n"
        f"<table>\n<tr>{_cells('th', table.columns, table.labels)}</tr>\n{rows}\n</table>"
    )


def _figure(plot: Plot, path: Path) -> str:
    _draw(plot, path)
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(plot.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def said(section: Section) -> dict[str, str]:
    return {
        "The paper": section.claim,
        "Here": section.found,
        "What can be compared": section.comparable,
    }


def _machine(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {versions['torch']}, "
        f"Python {versions['python']}; {results['date']}; {results['command']}, "
        f"{results['seconds_taken']:.0f} s."
    )


def write(
    sections: Mapping[str, Section], results: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    """papers.html and a PNG of every plot."""
    parts = [f"<p>{escape(paragraph)}</p>" for paragraph in _INTRODUCTION]
    links = (f'<li><a href="#{name}">{escape(s.title)}</a></li>' for name, s in sections.items())
    parts.append(f"<ul>{''.join(links)}</ul>")
    for name, section in sections.items():
        terms = (f"<dt>{term}</dt><dd>{escape(x)}</dd>" for term, x in said(section).items())
        parts.append(f'<h2 id="{name}">{escape(section.title)}</h2>')
        parts.append(f"<dl>{''.join(terms)}</dl>")
        parts.append(f"<p class=note>{escape(_machine(results[name]))}</p>")
        parts += [
            _figure(plot, folder / f"papers-{name}-{plot.name}.png") for plot in section.plots
        ]
        parts += [_table(table) for table in section.tables]
    title = "Two papers, tried with msrnn_ops"
    body = "\n".join(parts)
    (folder / "papers.html").write_text(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n"
        f"<style>{_STYLE}</style>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n",
        "utf-8",
    )


def show(sections: Mapping[str, Section]) -> None:
    for section in sections.values():
        console().rule(Text(section.title, style="bold"), align="left")
        for term, text in said(section).items():
            console().print(Text(f"{term}: ", style="bold").append(text, style="not bold"))
        show_tables(*section.tables)
