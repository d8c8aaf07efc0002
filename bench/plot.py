"""The picture of a results file: time and error of min_gru against T.

``python -m bench.plot bench/results/cpu.json`` draws it again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

_COLOURS = {
    "msrnn_ops": "#0b6e4f",
    "Heinsen": "#c1440e",
    "Heinsen compiled": "#e08e45",
    "associative scan compiled": "#3d5a98",
    "reference loop": "#7a7a7a",
}


def _series(
    rows: list[dict[str, Any]], name: str, gate_mean: int
) -> list[tuple[int, dict[str, Any]]]:
    found = [
        (row["shape"][1], row["competitors"][name])
        for row in rows
        if name in row["competitors"] and row["gate_mean"] == gate_mean
    ]
    return sorted(found, key=lambda point: point[0])


def _draw_time(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name, colour in _COLOURS.items():
        points = _series(rows, name, 0)
        if points:
            times = [result["time"]["median"] * 1e3 for _, result in points]
            axes.plot([t for t, _ in points], times, "o-", color=colour, label=name)
    axes.set_ylabel("time of forward and backward (ms)")
    axes.set_title("Time")


def _draw_error(axes: Axes, rows: list[dict[str, Any]]) -> None:
    curves = [
        ("msrnn_ops", 0, "error_h", "-", "msrnn_ops, h"),
        ("msrnn_ops", 0, "error_gate", "--", "msrnn_ops, gate gradient"),
        ("msrnn_ops", -8, "error_gate", ":", "msrnn_ops, gate gradient, slow gates"),
        ("Heinsen", 0, "error_h", "-", "Heinsen, h"),
        ("Heinsen", 0, "error_gate", "--", "Heinsen, gate gradient"),
    ]
    for name, mean, key, style, label in curves:
        points = _series(rows, name, mean)
        if points:
            errors = [result[key] for _, result in points]
            axes.plot(
                [t for t, _ in points], errors, style, marker="o", color=_COLOURS[name], label=label
            )
    axes.set_ylabel("relative error against float64")
    axes.set_title("Error")


def draw(results: dict[str, Any], path: Path) -> None:
    rows = results["accuracy"]
    pyplot.rcParams.update({"font.size": 10, "lines.linewidth": 1.8, "lines.markersize": 4})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    _draw_time(left, rows)
    _draw_error(right, rows)
    lengths = sorted({row["shape"][1] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("sequence length T (steps)")
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False,
            fontsize=9,
            ncols=2,
            handlelength=3.5,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )
    machine = results["machine"]
    figure.suptitle(
        f"min_gru, float32, B = 1, D = {rows[0]['shape'][2]}; "
        f"{machine['processor']}, {machine['threads']} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.plot RESULTS.json")
    path = Path(sys.argv[1])
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
