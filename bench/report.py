"""Tables of a results file: Markdown for the README, or the same for a terminal.

``python -m bench.report bench/results/cpu.json`` prints the Markdown.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench import cuda_report
from bench.table import Table, dimensions, duration, number, op_label, unit_of

_OURS = "msrnn_ops"
_PEERS = ("Heinsen", "Heinsen compiled", "associative scan compiled", "reference loop")


def _against(row: dict[str, Any], peer: str) -> str:
    """Our speed over a peer's, and the peer's time."""
    result = row["competitors"].get(peer)
    if result is None:
        return ""
    if "time" not in result:
        return "failed"
    median = result["time"]["median"]
    unit, name = unit_of(median)
    ratio = median / row["competitors"][_OURS]["time"]["median"]
    return f"{number(ratio, 2)}× ({number(median / unit, 2)} {name})"


def _present(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [peer for peer in _PEERS if any(peer in row["competitors"] for row in rows)]


def _ops_speed(rows: Sequence[dict[str, Any]], title: str) -> Table:
    peers = _present(rows)
    cells = []
    for row in rows:
        ours = row["competitors"][_OURS]["time"]
        rate, share = row["traffic"] / ours["median"], row["copy"]["median"] / ours["median"]
        figures = [duration(ours), f"{rate / 1e9:.1f}", f"{share:.0%}"]
        against = [_against(row, peer) for peer in peers]
        cells.append([op_label(row), dimensions(row["shape"]), *figures, *against])
    note = (
        "Median ± half the interquartile range. GB/s of the least traffic; its share of a "
        "streaming copy of as many bytes (tensors in cache can exceed it). Peers: how many times "
        "as long they take (more than 1×: we are faster), and their time. Blank: not run."
    )
    columns = ("op", "B×T×D", _OURS, "GB/s", "of copy", *(f"vs {peer}" for peer in peers))
    return Table(title, note, columns, cells, labels=2)


def _ops_error(rows: Sequence[dict[str, Any]], title: str) -> Table:
    names = [_OURS, *_present(rows)]
    cells = []
    for row in rows:
        errors = [row["competitors"].get(name, {}).get("error") for name in names]
        shown = ["" if error is None else f"{error:.1e}" for error in errors]
        cells.append([op_label(row), dimensions(row["shape"]), *shown])
    note = "Largest error against float64 over the largest true value; the worst tensor counts."
    return Table(title, note, ("op", "B×T×D", *names), cells, labels=2)


def _limits(limits: dict[str, Any]) -> Table:
    rows = [
        [
            f"{row['traffic'] >> 20} MiB",
            duration(row["time"]),
            f"{row['bytes_per_second'] / 1e9:.1f}",
        ]
        for row in limits["copies"]
    ]
    note = f"Half of the bytes read, half written. Method: {limits['method']}."
    return Table("Copying memory", note, ("traffic", "time", "GB/s"), rows)


def _memory(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        [row["op"], row["competitor"], "n/a" if row["tensors"] is None else f"{row['tensors']:.2f}"]
        for row in rows
    ]
    title = f"Peak memory of forward and backward at {dimensions(rows[0]['shape'])}"
    note = "In tensors of B·T·D float32, besides the inputs and the gradient of the output."
    return Table(title, note, ("op", "", "tensors"), cells, labels=2)


def _accuracy(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        [
            name,
            f"{row['gate_mean']}",
            f"{row['shape'][1]:,}",
            duration(result["time"]),
            f"{result['error_h']:.1e}",
            f"{result['error_gate']:.1e}",
        ]
        for row in sorted(rows, key=lambda row: -row["gate_mean"])
        for name, result in row["competitors"].items()
    ]
    order = (_OURS, *_PEERS)
    cells.sort(key=lambda cell: (-int(cell[1]), order.index(cell[0])))
    width = rows[0]["shape"][2]
    note = (
        "Norm of the error against float64 over the norm of the truth. Gates around 0 remember a "
        "few steps, gates around -8 some thousands."
    )
    columns = ("", "mean gate", "T", "forward + backward", "error of h", "error of gate gradient")
    return Table(f"min_gru against T, 1×T×{width}", note, columns, cells)


def _steps(rows: Sequence[dict[str, Any]]) -> Table:
    peers = [name for name in rows[0]["competitors"] if name not in ("TOVA", "Window")]

    def ratio(row: dict[str, Any], name: str) -> str:
        if name not in row["competitors"]:
            return ""
        median = row["competitors"][name]["median"]
        unit, symbol = unit_of(median)
        over = median / row["competitors"]["TOVA"]["median"]
        return f"{number(over, 2)}× ({number(median / unit, 2)} {symbol})"

    cells = []
    for row in rows:
        tova, window = (row["competitors"][name]["median"] for name in ("TOVA", "Window"))
        read = row["read"]["median"]
        cells.append(
            [
                row["dtype"],
                f"{row['batch']}×{row['slots']:,}",
                duration(row["competitors"]["TOVA"]),
                f"{row['traffic'] / tova / 1e9:.1f}",
                f"{read / tova:.0%}",
                f"{read / window:.0%}",
                f"{tova / window:.2f}×",
                *(ratio(row, name) for name in peers),
                f"{row['error']:.0e}",
            ]
        )
    note = (
        "32 query heads, 8 key-value heads, head_dim 128; attend_evict under TOVA. GB/s of keys "
        "and values; time to read as many bytes over ours (of a cache, where they fit), and over "
        "Window's; what scoring costs; peers: how many times as long they take. Error of the "
        "output against float64."
    )
    ours = ("", "B×slots", "TOVA", "GB/s", "of reading", "Window, of reading", "TOVA / Window")
    columns = (*ours, *(f"vs {peer}" for peer in peers), "error")
    return Table("One decode step", note, columns, cells, labels=2)


def _decoding(loop: dict[str, Any]) -> Table:
    cells = [
        [name, number(row["tokens_per_second"]), f"{row['bytes'] / 2**20:,.0f} MiB"]
        for name, row in loop["contenders"].items()
    ]
    title = f"Decoding, the attention of {loop['layers']} layers"
    note = f"B = 1, bfloat16, heads as above; {loop['slots']:,} slots where the memory is bounded."
    return Table(title, note, ("", "tokens/s", "memory"), cells)


def _layers(row: dict[str, Any]) -> Table:
    layers = row["layers"]

    def over(name: str, other: str) -> str:
        return f"{number(layers[name]['median'] / layers[other]['median'])}×"

    cells = []
    for name in layers:
        lstm = "LSTM" in name or "3 D" in name
        projection, ours = f"projection to {3 if lstm else 2} D", f"min{'LSTM' if lstm else 'GRU'}"
        joint = over(name, f"{ours}, joint")
        cells.append([name, duration(layers[name]), over(name, projection), joint])
    note = "Gradients of the parameters and of the layer's input."
    columns = ("layer", "time", "over its projection", "over the joint form")
    return Table(f"Layers, forward and backward, {dimensions(row['shape'])}", note, columns, cells)


def _text(text: dict[str, Any]) -> Table:
    cells = []
    for name, model in text["models"].items():
        curve = model["curve"]
        picks = [curve[round(part * (len(curve) - 1) / 4)] for part in range(5)]
        falling = " → ".join(f"{point['bits_per_character']:.2f}" for point in picks)
        difference = model.get("step_difference")
        cells.append(
            [
                name,
                f"{model['parameters']:,}",
                falling,
                f"{model['held_out_bits_per_character']:.3f}",
                f"{model['tokens_per_second']:,.0f}",
                "" if difference is None else f"{difference:.0e}",
                f"{model['generated_per_second']:,.0f}" if "generated_per_second" in model else "",
            ]
        )
    note = (
        f"{text['text']}, {text['characters']:,} characters; width {text['width']}, "
        f"{text['layers']} blocks, {text['batch']}×{text['time']} tokens a step, {text['steps']} "
        "steps. Bits per character in training from the first step to the last, then on the "
        "held-out tenth; largest difference of the step form's logits from the parallel form's."
    )
    columns = (
        "recurrence",
        "parameters",
        "bits in training",
        "held out",
        "tokens/s",
        "step form",
        "written/s",
    )
    return Table("A small language model", note, columns, cells)


def tables(results: dict[str, Any]) -> list[Table]:
    if "gpu" in results["machine"]:
        return cuda_report.tables(results)
    found = []
    if "limits" in results:
        found.append(_limits(results["limits"]))
    if "ops" in results:
        for backward, title in ((False, "Forward"), (True, "Forward and backward")):
            rows = [row for row in results["ops"] if row["backward"] == backward]
            found.append(_ops_speed(rows, title))
            found.append(_ops_error(rows, "Error of gradients" if backward else "Error of values"))
    if results.get("memory"):
        found.append(_memory(results["memory"]))
    if "steps" in results:
        found += [_steps(results["steps"]), _decoding(results["decoding"])]
    if "accuracy" in results:
        found.append(_accuracy(results["accuracy"]))
    found += [_layers(row) for row in results.get("layers", [])]
    if "text" in results:
        found.append(_text(results["text"]))
    return found


def heading(results: dict[str, Any]) -> str:
    if "gpu" in results["machine"]:
        return cuda_report.heading(results)
    machine, versions = results["machine"], results["versions"]
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {versions['torch']}, "
        f"Python {versions['python']}; {results['date']}; `{results['command']}`, "
        f"{sum(results['seconds_taken'].values()):.0f} s. {results['settings']['freed_memory']}."
    )


def markdown(results: dict[str, Any]) -> str:
    parts = [heading(results)]
    for table in tables(results):
        rule = [":--"] * table.labels + ["--:"] * (len(table.columns) - table.labels)
        lines = ["| " + " | ".join(row) + " |" for row in (table.columns, rule, *table.rows)]
        parts.append(f"**{table.title}.** {table.note}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def rich_table(table: Table) -> RichTable:
    """A table for the terminal."""
    shown = RichTable(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, column in enumerate(table.columns):
        header = textwrap.fill(column, 12, break_long_words=False)
        shown.add_column(header, justify="left" if i < table.labels else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def show(results: dict[str, Any], console: Console) -> None:
    console.print(Text(heading(results)))
    for table in tables(results):
        console.print(
            Text(f"\n{table.title}", style="bold"), Text(table.note, style="dim"), sep="\n"
        )
        console.print(rich_table(table))
    for name, model in results.get("text", {}).get("models", {}).items():
        if "generated" in model:
            console.rule(f"{name} continues the held-out text", align="left")
            console.print(Text(model["prompt"], style="dim"), Text(model["generated"]), sep="")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.report RESULTS.json")
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
