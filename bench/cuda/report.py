"""Tables of the results of ``python -m bench cuda``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cuda.steps import ATTENDING, COPY, H2O, READ, SCORED, TRITON
from bench.peers import OURS
from bench.step_peers import IN_PLACE, OFFICIAL, TOVA, WINDOW
from bench.table import Table, dimensions, op_label, time_or_failure, times_as_long


def _limits(limits: dict[str, Any]) -> Table:
    rows = [
        [f"{row['traffic'] >> 20} MiB"]
        + [f"{row['bytes_per_second'][name] / 1e9:,.0f}" for name in ("copy", "add")]
        for row in limits["copies"]
    ]
    launch = limits["empty_kernel"]["median"] * 1e6
    note = (
        "GB/s of bytes read and written, of memory, not the L2. An empty kernel in a graph takes "
        f"{launch:.2f} µs."
    )
    return Table("Moving memory", note, ("traffic", "copy", "add, 2 reads and 1 write"), rows)


def _ops(rows: Sequence[dict[str, Any]], which: str) -> Table:
    cells = []
    for row in rows:
        ours, figures = row["competitors"][OURS], [""] * 4
        if "time" in ours:
            median, copy = ours["time"]["median"], row["copy"]["median"]
            figures = [f"{row['traffic'] / median / 1e9:,.0f}", f"{copy / median:.0%}"]
            figures += [f"{ours['tensors']:.2f}", f"{ours['error']:.0e}"]
        cells.append([op_label(row), dimensions(row["shape"]), time_or_failure(ours), *figures])
    note = (
        "Median ± half the interquartile range, the L2 emptied before each repetition. GB/s of the "
        "least traffic; time of a copy of as many bytes over ours; peak memory in tensors of "
        "B·T·D; largest error against float64 over the largest true value."
    )
    columns = ("op", "B×T×D", OURS, "GB/s", "of copy", "tensors", "error")
    return Table(which[0].upper() + which[1:], note, columns, cells, labels=2)


def _peers(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        for name, result in row["competitors"].items():
            if name == OURS:
                continue
            times = times_as_long(row["competitors"], name, OURS)
            words = [op_label(row), dimensions(row["shape"]), row["pass"], name]
            figures = ["", ""]
            if "time" in result:
                figures = [f"{result['tensors']:.1f}", f"{result['error']:.0e}"]
            cells.append([*words, times, *figures])
    note = (
        "How many times as long they take (more than 1×: we are faster), and their time; memory "
        "and error as above. What failed is named by its exception."
    )
    columns = ("op", "B×T×D", "", "peer", "times as long", "tensors", "error")
    return Table(title, note, columns, cells, labels=4)


def _steps(rows: Sequence[dict[str, Any]]) -> Table:
    """Our step against the limits and the best that only attends."""
    named = (COPY, READ, *ATTENDING, SCORED, IN_PLACE, OFFICIAL, WINDOW, H2O, TRITON)
    cells = []
    for row in rows:
        results = row["competitors"]

        def ratio(name: str, results: dict[str, Any] = results) -> str:
            if "time" not in results.get(name, {}):
                return results.get(name, {}).get("failed", "")
            return f"{results[name]['time']['median'] / results[TOVA]['time']['median']:.2f}×"

        words = [row["dtype"], dimensions(row["heads"]), f"{row['batch']}×{row['slots']:,}"]
        figures = [""] * 2
        if "time" in results[TOVA]:
            rate = row["traffic"] / results[TOVA]["time"]["median"]
            figures = [f"{rate / 1e9:,.0f}", f"{row['error']:.0e}"]
        cells.append([*words, time_or_failure(results[TOVA]), *figures, *map(ratio, named)])
    note = (
        "attend_evict under TOVA, a full state, the L2 emptied before each repetition. GB/s of "
        "keys and values; error of the output against float64. Then how many times as long as "
        "ours: a copy and a read of as many bytes; what attends alone; what also evicts; our own "
        "other policies."
    )
    columns = ("", "Hq×Hkv×Dh", "B×slots", TOVA, "GB/s", "error", *named)
    return Table("One decode step", note, columns, cells, labels=3)


def _decoding(found: dict[str, Any]) -> Table:
    rows = found["rows"]
    ran = [row for row in rows if "time" in row]
    best = {
        name: max(row["tokens_per_second"] for row in ran if row["name"] == name)
        for name in dict.fromkeys(row["name"] for row in ran)
    }
    full = best.get("full cache")
    cells = []
    for row in rows:
        words = [row["name"], f"{row['slots']:,}", str(row["batch"])]
        if "time" not in row:
            cells.append([*words, row["failed"], "", ""])
            continue
        rate = row["tokens_per_second"]
        gain = f"{rate / full:.2f}×" if full else ""
        shown = f"{rate:,.0f}" + ("" if row["graph"] else ", no graph")
        cells.append([*words, shown, f"{row['bytes'] / 2**30:.2f} GiB", gain])
    note = (
        f"{found['layers']} layers of LLaMA-2-7B's shape with random weights, in bfloat16, no "
        f"embeddings, in one CUDA graph; {found['context']:,} tokens, all kept or some. "
        "The last column is over the full cache at its best batch that fits in memory."
    )
    columns = ("kept", "slots", "batch", "tokens/s", "keys and values", "over full")
    return Table("Decoding", note, columns, cells, labels=2)


def _layers(rows: Sequence[dict[str, Any]]) -> Table:
    pairs = (("minGRU, joint", "nn.GRU"), ("minLSTM, joint", "nn.LSTM"))
    cells = []
    for row in rows:
        layers = row["layers"]
        times = [(time_or_failure(layers[a]), times_as_long(layers, b, a)) for a, b in pairs]
        words = [row["dtype"], dimensions(row["shape"]), row["pass"]]
        cells.append([*words, *times[0], *times[1]])
    note = (
        "A projection and its scan; gradients of the parameters and of the layer's input. "
        "cuDNN's layers: how many times as long they take. Products may use TF32."
    )
    columns = ("", "B×T×D", "", *(name for a, b in pairs for name in (a, f"vs {b}")))
    return Table("Layers", note, columns, cells, labels=3)


def _small(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        [name, row["dtype"], dimensions(row["shape"]), time_or_failure(result)]
        for row in rows
        for name, result in row["calls"].items()
    ]
    note = "Device time per forward call, one after the other in a graph; the L2 is warm."
    return Table("Small calls", note, ("", "", "shape", "time"), cells, labels=3)


def tables(results: dict[str, Any]) -> list[Table]:
    found = [_limits(results["limits"])] if "limits" in results else []
    rows = results.get("ops", [])
    for which in dict.fromkeys(row["pass"] for row in rows):
        found.append(_ops([row for row in rows if row["pass"] == which], which))
    found += [_peers("Triton beside CUDA", results["triton"])] if "triton" in results else []
    found += [_peers("Peers", results["peers"])] if "peers" in results else []
    found += [_steps(results["steps"])] if "steps" in results else []
    found += [_decoding(results["decoding"])] if "decoding" in results else []
    found += [_layers(results["layers"])] if "layers" in results else []
    found += [_small(results["small"])] if "small" in results else []
    return found


def heading(results: dict[str, Any]) -> str:
    gpu = results["machine"]["gpu"]
    return (
        f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 of "
        f"{gpu['l2'] / 2**20:.0f} MiB, {gpu['memory'] / 2**30:.0f} GiB; torch {gpu['torch']}, "
        f"CUDA {gpu['cuda']}, driver {gpu.get('driver_version', 'unknown')}; {results['date']}; "
        f"`{results['command']}`, {sum(results['seconds_taken'].values()):.0f} s."
    )
