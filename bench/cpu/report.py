"""Tables of the results of ``python -m bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.peers import OURS, PEERS
from bench.step_peers import TOVA, WINDOW
from bench.table import Table, dimensions, duration, number, op_label, times_as_long


def _present(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [peer for peer in PEERS if any(peer in row["competitors"] for row in rows)]


def _ops_speed(rows: Sequence[dict[str, Any]], title: str) -> Table:
    peers = _present(rows)
    cells = []
    for row in rows:
        ours = row["competitors"][OURS]["time"]
        rate, share = row["traffic"] / ours["median"], row["copy"]["median"] / ours["median"]
        figures = [duration(ours), f"{rate / 1e9:.1f}", f"{share:.0%}"]
        against = [times_as_long(row["competitors"], peer, OURS) for peer in peers]
        cells.append([op_label(row), dimensions(row["shape"]), *figures, *against])
    note = (
        "Median ± half the interquartile range. GB/s of the least traffic; its share of a "
        "streaming copy of as many bytes (tensors in cache can exceed it). Peers: how many times "
        "as long they take (more than 1×: we are faster), and their time. Blank: not run."
    )
    columns = ("op", "B×T×D", OURS, "GB/s", "of copy", *(f"vs {peer}" for peer in peers))
    return Table(title, note, columns, cells, labels=2)


def _ops_error(rows: Sequence[dict[str, Any]], title: str) -> Table:
    names = [OURS, *_present(rows)]
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
    order = (OURS, *PEERS)
    cells.sort(key=lambda cell: (-int(cell[1]), order.index(cell[0])))
    width = rows[0]["shape"][2]
    note = (
        "Norm of the error against float64 over the norm of the truth. Gates around 0 remember a "
        "few steps, gates around -8 some thousands."
    )
    columns = ("", "mean gate", "T", "forward + backward", "error of h", "error of gate gradient")
    return Table(f"min_gru against T, 1×T×{width}", note, columns, cells)


def _steps(rows: Sequence[dict[str, Any]]) -> Table:
    peers = [name for name in rows[0]["competitors"] if name not in (TOVA, WINDOW)]

    cells = []
    for row in rows:
        tova, window = (row["competitors"][name]["median"] for name in (TOVA, WINDOW))
        read = row["read"]["median"]
        timed = {name: {"time": timing} for name, timing in row["competitors"].items()}
        cells.append(
            [
                row["dtype"],
                f"{row['batch']}×{row['slots']:,}",
                duration(row["competitors"][TOVA]),
                f"{row['traffic'] / tova / 1e9:.1f}",
                f"{read / tova:.0%}",
                f"{read / window:.0%}",
                f"{tova / window:.2f}×",
                *(times_as_long(timed, name, TOVA) for name in peers),
                f"{row['error']:.0e}",
            ]
        )
    note = (
        "32 query heads, 8 key-value heads, head_dim 128; attend_evict under TOVA. GB/s of keys "
        "and values; time to read as many bytes over ours (of a cache, where they fit), and over "
        "Window's; what scoring costs; peers: how many times as long they take. Error of the "
        "output against float64."
    )
    ours = ("", "B×slots", TOVA, "GB/s", "of reading", "Window, of reading", "TOVA / Window")
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


def _training(found: dict[str, Any]) -> Table:
    layers = found["layers"]

    def over(name: str, memory: str, kind: str) -> str:
        at_once = name.split(", chunk")[0] if "chunk" in name else "minGRU"
        times, whole = (layers[x].get(memory, {}) for x in (name, at_once))
        if kind not in times or kind not in whole or name in ("minGRU", "minLSTM"):
            return ""
        return f"{number(times[kind]['median'] / whole[kind]['median'])}×"

    cells = []
    for name, row in layers.items():
        shown = []
        for kind in ("forward", "forward and backward"):
            tensors, time = row["tensors"][kind], row.get("fresh", {}).get(kind)
            shown.append("n/a" if tensors is None else f"{tensors:.2f}")
            shown.append("n/a" if time is None else duration(time))
            shown += [over(name, memory, kind) for memory in ("fresh", "reused")]
        cells.append([name, *shown])
    title = f"A layer on a long sequence, {dimensions(found['shape'])} float32"
    note = (
        "Peak memory in tensors of B·T·D, besides the parameters, the input and the gradient of "
        "the output; time; over the same cell at once (other layers: over minGRU), with memory as "
        "the system gives it and with freed memory reused. First forward, then with backward."
    )
    columns = ("layer", *("tensors", "time", "over at once", "memory reused") * 2)
    return Table(title, note, columns, cells)


def _small(rows: list[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        beside, *others = row["times"]
        least = row["times"][beside]
        for name in others:
            time = row["times"][name]
            times = f"{number(time['median'] / least['median'], 2)}×"
            cells.append([row["kind"], row["size"], name, duration(time), beside, times])
    note = "Without gradients but where they are named; a layer's size is rows, steps and width."
    columns = ("what", "size", "ours", "time", "beside", "over it")
    return Table("Small calls, one thread", note, columns, cells, labels=3)


def tables(results: dict[str, Any]) -> list[Table]:
    found = [_limits(results["limits"])] if "limits" in results else []
    for backward, title in ((False, "Forward"), (True, "Forward and backward")):
        rows = [row for row in results.get("ops", []) if row["backward"] == backward]
        if rows:
            found.append(_ops_speed(rows, title))
            found.append(_ops_error(rows, "Error of gradients" if backward else "Error of values"))
    for part, table in _TABLES.items():
        found += [table(results[part])] if part in results else []
    return found + [_layers(row) for row in results.get("layers", [])]


_TABLES: dict[str, Callable[[Any], Table]] = {
    "memory": _memory,
    "steps": _steps,
    "decoding": _decoding,
    "accuracy": _accuracy,
    "training": _training,
    "small": _small,
}


def heading(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    memory = results["settings"].get("freed_memory")
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {versions['torch']}, "
        f"Python {versions['python']}; {results['date']}; `{results['command']}`, "
        f"{sum(results['seconds_taken'].values()):.0f} s.{f' {memory}.' if memory else ''}"
    )
