"""The scans over 8 to 1024 GPUs, on paper: ``python -m bench.scaling``.

Writes the tables of bench/scaling.md, from a cost model (bench.scaling_model) whose assumptions are
options here, and from what ``--measure`` found on this machine, with 2 and 4 processes, to say how
far the model can be trusted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from bench.report import rich_table
from bench.roofline import GOAL, MACHINES
from bench.scaling_model import (
    DOUBLING,
    EXCHANGES,
    NOW,
    ONE_GATHER,
    READ_ONLY,
    RING,
    SCAN,
    Exchange,
    Link,
    Machine,
    Plan,
    Problem,
    alone,
    crossover,
    exchange_time,
    simulate,
)
from bench.table import Table, number

PAGE = Path(__file__).with_name("scaling.md")
RESULTS = Path(__file__).with_name("results") / "scaling.json"
GPUS = (8, 64, 256, 1024)
_COPY = next(machine.bandwidth for machine in MACHINES if machine.name == "H100 SXM")


@dataclass(frozen=True)
class Assumption:
    name: str
    value: float
    unit: str
    source: str


ASSUMPTIONS = (
    Assumption(
        "bandwidth",
        round(GOAL * _COPY / 1e9),
        "GB/s",
        "a pass: 0.85 of an H100's copy (bench.roofline)",
    ),
    Assumption("kernel", 3, "µs", "launch and drain of a scan: estimate"),
    Assumption("call", 8, "µs", "a collective besides its hops: NCCL's tuning.cc has 6.6 to 8.4"),
    Assumption("nvlink-latency", 3, "µs", "a hop: same file, 0.6 (LL) to 3.4 (simple protocol)"),
    Assumption("nvlink-bandwidth", 450, "GB/s", "NVLink 4, each direction: data sheet"),
    Assumption("network-latency", 10, "µs", "a hop: same file, 2.7 (LL) to 14 (simple protocol)"),
    Assumption("network-bandwidth", 50, "GB/s", "InfiniBand NDR, a card of 400 Gb/s for each GPU"),
    Assumption("node", 8, "GPUs", "DGX H100"),
)


def gpus(values: dict[str, float]) -> Machine:
    rate = values["bandwidth"] * 1e9

    def link(name: str) -> Link:
        return Link(values[f"{name}-latency"] * 1e-6, values[f"{name}-bandwidth"] * 1e9)

    return Machine(
        scan=rate,
        decay=rate,
        backward=rate,
        kernel=values["kernel"] * 1e-6,
        call=values["call"] * 1e-6,
        inner=link("nvlink"),
        outer=link("network"),
        node=int(values["node"]),
    )


def _assumptions(values: dict[str, float]) -> Table:
    rows = [[f"--{a.name}", f"{values[a.name]:g} {a.unit}", a.source] for a in ASSUMPTIONS]
    return Table("Assumptions", "", ("option", "value", "what, and whence"), rows, labels=3)


def _passes() -> Table:
    def column(plan: Plan) -> list[int]:
        return [plan.last, plan.decay, plan.scan, plan.adjoint, plan.gradients]

    names = (
        "forward: last state of the shard",
        "forward: decay of the shard",
        "forward: scan from the entering state",
        "backward: adjoint that leaves the shard",
        "backward: gradients from the entering adjoint",
    )
    plans = (Plan(last=0, decay=0, adjoint=0), NOW, READ_ONLY)
    columns = [column(plan) for plan in plans]
    rows = [[name, *map(str, counts)] for name, *counts in zip(names, *columns, strict=True)]
    rows.append(["together", *(str(sum(counts)) for counts in columns)])
    bounds = [f"{sum(columns[0]) / sum(counts):.0%}" for counts in columns]
    rows.append(["at most this efficiency", *bounds])
    return Table(
        "Local passes",
        "Tensors of B·T/R·D that min_gru reads and writes.",
        ("pass", "one GPU", "shards, as it is", "read-only summaries"),
        rows,
    )


VARIANTS = ((NOW, RING), (ONE_GATHER, RING), (READ_ONLY, RING), (READ_ONLY, SCAN))


def efficiency(
    machine: Machine, ranks: int, problem: Problem, plan: Plan, exchange: Exchange
) -> float:
    """Of forward and backward: the time of one GPU over that of so many, times so many."""
    passes = (False, True)
    one = sum(alone(machine, problem, backward) for backward in passes)
    taken = sum(simulate(machine, ranks, problem, plan, exchange, b) for b in passes)
    return one / taken / ranks


def _strong(machine: Machine) -> Table:
    rows = []
    for batch, channels in ((1, 4096), (8, 2048)):
        for time in (10**6, 10**7, 10**8):
            problem = Problem(batch, time, channels)
            cells = [
                " · ".join(f"{efficiency(machine, r, problem, *v):.0%}" for v in VARIANTS)
                for r in GPUS
            ]
            rows.append([f"{batch}×{channels}, {time // 10**6} M", *cells])
    return Table(
        "Efficiency",
        "bfloat16, forward and backward, against one GPU that held it all. In each cell: as it is "
        "· one gather of all channels · and read-only summaries · and a doubling scan.",
        ("B×D, T", *(f"{ranks} GPUs" for ranks in GPUS)),
        rows,
    )


def _exchanges(machine: Machine) -> Table:
    rows = []
    for states in (4096, 16384):
        for ranks in GPUS:
            times = [exchange_time(machine, ranks, states, exchange) for exchange in EXCHANGES]
            cells = [f"{time * 1e6:,.0f}" for time in times]
            best = times.index(min(times))
            cells[best] = f"**{cells[best]}**"
            rows.append([f"{states}", f"{ranks}", *cells])
    return Table(
        "Exchanges",
        "µs of the exchange of forward in one piece, with its fold, on nodes of 8.",
        ("B·D", "GPUs", *(exchange.name for exchange in EXCHANGES)),
        rows,
    )


def _crossovers(machine: Machine) -> Table:
    def cell(states: int, link: Link, exchange: Exchange, of: str) -> str:
        found = []
        for factor in (1 / 3, 1, 3):
            flat = machine.flat(link)
            if of == "call":
                flat = replace(flat, call=machine.call * factor)
            else:
                flat = flat.flat(replace(link, latency=link.latency * factor))
            ranks = crossover(flat, states, exchange)
            found.append("always" if ranks <= 4 else f"{math.ceil(ranks):,}")
        return " · ".join(found)

    rows = [
        [f"{states:,}"]
        + [
            cell(states, link, exchange, of)
            for exchange, of in ((RING, "latency"), (DOUBLING, "call"))
            for link in (machine.inner, machine.outer)
        ]
        for states in (4096, 16384, 65536, 262144)
    ]
    return Table(
        "Crossovers",
        "Ranks from which a doubling scan takes less time, links of one kind. In each cell: the "
        "latency (ring) or call (doubling) over 3 · as assumed · times 3. Always: from 4 on.",
        ("B·D", "ring, NVLink", "ring, network", "doubling, NVLink", "doubling, network"),
        rows,
    )


def _line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Start and rate of time = start + size / rate, by least squares of relative errors."""
    size, time = np.array(sizes), np.array(times)
    design = np.stack([1 / time, size / time], 1)
    start, slope = np.linalg.lstsq(design, np.ones_like(time))[0]
    return max(float(start), 0.0), 1 / float(slope)


def _rows(results: dict[str, Any], name: str, *ranks: int) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["name"] == name and row["ranks"] in ranks]


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(row["batch"], row["time"], row["channels"], row["element"])


@dataclass(frozen=True)
class Fit:
    """This machine as its parts show it: local passes alone and in twos, gathers of 2 ranks."""

    alone: dict[tuple[Problem, int], Machine]  # whose shard of how many one rank computes
    contention: float  # of two ranks that compute
    link: Link  # of two ranks
    cores: int

    def machine(self, problem: Problem, ranks: int) -> Machine:
        """Ranks that share cores: they compute, and handle messages, in turns."""
        turns = max(1.0, ranks / self.cores)
        return self.alone[problem, ranks].slower(self.contention * turns, turns)


def fit(results: dict[str, Any]) -> Fit:
    names = ("forward", "decay", "both")
    found = {name: _rows(results, f"local {name} alone", 2, 4) for name in names}
    shards = [(_problem(row), row["ranks"]) for row in found["forward"]]
    tensors = [p.states * p.time / ranks * p.element for p, ranks in shards]
    times = [[row["median"] for row in found[name]] for name in names]
    kernel, _ = _line([3 * tensor for tensor in tensors], times[0])
    gathers = _rows(results, "gather", 2)
    sizes, taken = [row["size"] for row in gathers], [row["median"] for row in gathers]
    link = Link(*_line(sizes, taken))

    def rate(size: float, seconds: float) -> float:
        return size / max(seconds - kernel, 1e-9)

    alone = {
        shard: Machine(
            scan=rate(3 * tensor, forward),
            decay=rate(2 * tensor, decay),
            backward=rate(6 * tensor, both - forward),
            kernel=kernel,
            call=0.0,
            inner=link,
            outer=link,
            node=1,
            overlap=False,
        )
        for shard, tensor, forward, decay, both in zip(shards, tensors, *times, strict=True)
    }
    twos = [row["median"] for name in names for row in _rows(results, f"local {name}", 2)]
    ones = [row["median"] for name in names for row in found[name] if row["ranks"] == 2]
    contention = median(two / one for two, one in zip(twos, ones, strict=True))
    return Fit(alone, contention, link, results["machine"]["cores"])


def predictions(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured and simulated seconds of the whole op."""
    fitted, rows = fit(results), []
    for name, passes in (("forward", (False,)), ("both", (False, True))):
        for row in _rows(results, f"whole {name}", 2, 4):
            problem = _problem(row)
            machine = fitted.machine(problem, row["ranks"])
            taken = sum(simulate(machine, row["ranks"], problem, backward=b) for b in passes)
            key = {"name": name, "ranks": row["ranks"], "problem": problem}
            rows.append({**key, "measured": row["median"], "simulated": taken})
    return rows


def _measured(results: dict[str, Any]) -> Table:
    found: dict[tuple[Problem, int], list[str]] = {}
    for row in predictions(results):
        measured, simulated = row["measured"], row["simulated"]
        cells = [number(measured * 1e3), number(simulated * 1e3), f"{simulated / measured:.2f}"]
        found.setdefault((row["problem"], row["ranks"]), []).extend(cells)
    rows = [
        [f"{p.batch}×{p.time}×{p.channels}", f"{ranks}", *cells]
        for (p, ranks), cells in found.items()
    ]
    three = ("measured", "simulated", "ratio")
    columns = [f"{name}, {x}" for name in ("forward", "both") for x in three]
    return Table("Measured", "ms, float32.", ("B×T×D", "ranks", *columns), rows, labels=1)


def pipeline(blocks: int, ranks: int) -> float:
    """Efficiency of ranks that scan blocks of channels one after another, each from its carry."""
    return blocks / (blocks + ranks - 1)


def sentences(machine: Machine, results: dict[str, Any]) -> dict[str, str]:
    """Of the page."""
    fitted, computer = fit(results), results["machine"]
    here = fitted.alone[max(fitted.alone, key=lambda shard: shard[0].states * shard[0].time)]
    time, ranks, element = 10**7, 64, 2
    attention, ours = 2 * time // ranks * element, 2 * 4
    at_once = 512
    blocks = 8 * 2048 // at_once
    inside = [pipeline(blocks, ranks) for ranks in (8, 64)]
    rows = predictions(results)
    errors = sorted(row["simulated"] / row["measured"] for row in rows)
    long = [row["simulated"] / row["measured"] for row in rows if row["problem"].time >= 4096]
    gathers = _rows(results, "gather", 4)
    turns = max(1.0, 4 / fitted.cores)
    ratios = [3 * turns * fitted.link.time(row["size"]) / row["median"] for row in gathers]
    attention_line = (
        f"- Ring attention sends the keys and values of a shard at each of its R - 1 steps, "
        f"2·B·T/R·D elements, where this sends 2·B·D numbers: at T = {time:,} on {ranks} ranks, "
        f"bfloat16, {attention // ours:,} times as many bytes."
    )
    pipeline_line = (
        f"- Without summaries, ranks could scan blocks of channels one after another, each from "
        f"the carry of the rank before: with C blocks an efficiency of C / (C + R - 1). For 8×2048 "
        f"in blocks of {at_once} that is {inside[0]:.0%} on 8 ranks (above any exchange "
        f"of summaries) and {inside[1]:.0%} on 64."
    )
    measured_line = (
        f"{computer['processor']}, {computer['cores']} virtual cores, gloo, torch "
        f"{results['versions']['torch']}, {results['date']}, {results['rounds']} rounds, load "
        f"{results['load']['before']} before and {results['load']['after']} after. From the parts: "
        f"a local call takes {here.kernel * 1e6:.0f} µs and then moves, on the largest shard, "
        f"{here.scan / 1e9:.1f} GB/s in a scan, {here.decay / 1e9:.1f} in that of the decay and "
        f"{here.backward / 1e9:.1f} in gradients; two ranks that compute take "
        f"{fitted.contention:.2f} times as long each; a message takes "
        f"{fitted.link.latency * 1e6:.0f} µs and {fitted.link.bandwidth / 1e9:.2f} GB/s. "
        f"Simulated over measured: {errors[0]:.2f} to {errors[-1]:.2f}, median "
        f"{median(errors):.2f}, from 4096 tokens on {min(long):.2f} to {max(long):.2f}; gathers of "
        f"4 ranks alone {min(ratios):.2f} to {max(ratios):.2f}."
    )
    return {"compared": f"{attention_line}\n{pipeline_line}", "machine": measured_line}


def tables(machine: Machine, values: dict[str, float], results: dict[str, Any]) -> dict[str, Table]:
    return {
        "assumptions": _assumptions(values),
        "passes": _passes(),
        "efficiency": _strong(machine),
        "exchanges": _exchanges(machine),
        "crossovers": _crossovers(machine),
        "measured": _measured(results),
    }


def markdown(table: Table) -> str:
    rule = [":--"] * table.labels + ["--:"] * (len(table.columns) - table.labels)
    lines = ["| " + " | ".join(row) + " |" for row in (table.columns, rule, *table.rows)]
    return "\n".join([*([f"{table.note}\n"] if table.note else []), *lines])


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with its parts between <!-- name --> and <!-- end -->."""
    names = re.findall(r"<!-- (?!end)(\w+) -->", page)
    if sorted(names) != sorted(parts):
        raise ValueError(f"expected the parts {sorted(parts)} in the page, got {sorted(names)}")
    for name, text in parts.items():
        before, mark, after = page.partition(f"<!-- {name} -->\n")
        page = before + mark + text + "\n" + after[after.index("<!-- end -->") :]
    return page


def page_parts(values: dict[str, float], results: dict[str, Any]) -> dict[str, str]:
    machine = gpus(values)
    found = {name: markdown(table) for name, table in tables(machine, values, results).items()}
    return found | sentences(machine, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for a in ASSUMPTIONS:
        what = f"{a.unit}; {a.source} (%(default)g)"
        parser.add_argument(f"--{a.name}", dest=a.name, type=float, default=a.value, help=what)
    parser.add_argument("--measure", action="store_true", help="this machine anew: minutes")
    parser.add_argument("--rounds", type=int, default=20, help="of --measure (%(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="fails where the page is not up to date"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.measure:
        from bench.scaling_measure import measure

        RESULTS.write_text(json.dumps(measure(options.rounds), indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    values = {a.name: getattr(options, a.name) for a in ASSUMPTIONS}
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables(gpus(values), values, results).values():
        console.print(f"\n[bold]{table.title}[/bold] {table.note}", rich_table(table))
    for sentence in sentences(gpus(values), results).values():
        console.print(sentence)
    if any(values[a.name] != a.value for a in ASSUMPTIONS) and not options.check:
        return  # the page has the defaults
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page, page_parts(values, results))
    if options.check and new != page:
        sys.exit(f"{PAGE.name} is not what python -m bench.scaling makes of it")
    if not options.check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
