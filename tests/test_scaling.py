"""The cost model of the scans over ranks: closed forms against messages walked one by one, limits,
and the page that shows its tables."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich")  # bench's, not the package's

from bench import report
from bench.estimates import scaling
from bench.estimates.scaling import Cluster, Link, Problem
from bench.table import markdown

pytestmark = pytest.mark.slow

BENCH = Path(scaling.__file__).parents[1]
CLUSTER = Cluster()
ALIKE = replace(CLUSTER, outer=CLUSTER.inner, node=1)
SLOW = replace(ALIKE, inner=Link(1e-3, 1e6), outer=Link(1e-3, 1e6))


def walked(cluster: Cluster, ready: list[float], free: list[float], size: float) -> list[float]:
    """When every rank has all summaries: each passes on what came last, and a port sends one at a
    time; `free`, when it can, is kept."""
    ranks = len(ready)
    ready = [time + cluster.call for time in ready]
    striped = min(cluster.outer.bandwidth * cluster.node, cluster.inner.bandwidth)
    for _ in range(ranks - 1):
        arrived = [0.0] * ranks
        for rank in range(ranks):
            to = (rank + 1) % ranks
            inside = rank // cluster.node == to // cluster.node
            link = cluster.inner if inside else replace(cluster.outer, bandwidth=striped)
            free[rank] = max(free[rank], ready[rank]) + size / link.bandwidth
            arrived[to] = free[rank] + link.latency
        ready = arrived
    return ready


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("cluster", [ALIKE, SLOW])
def test_a_gather_is_its_messages_on_links_of_one_kind(ranks: int, cluster: Cluster) -> None:
    for size in (8.0, 8 * 4096):
        expected = max(walked(cluster, [0.0] * ranks, [0.0] * ranks, size))
        assert cluster.gather(ranks, size) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [8, 16, 64])
def test_a_gather_is_its_messages_over_nodes(ranks: int) -> None:
    """But for the first hops, whose links are not the slowest."""
    for size in (8.0, 8 * 4096, 8 * 65536):
        expected = max(walked(CLUSTER, [0.0] * ranks, [0.0] * ranks, size))
        assert CLUSTER.gather(ranks, size) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("cluster", [ALIKE, SLOW])  # the gather hides behind the scans, or they do
@pytest.mark.parametrize("channels", [512, 2048])
def test_forward_is_its_passes_and_messages(cluster: Cluster, channels: int) -> None:
    ranks, problem = 4, Problem(2, channels, 1 << 20)
    parts = 1 if channels < 1024 else 2
    tensor = 2 * channels * (1 << 20) // ranks * 2
    clock, free, arrived = 0.0, [0.0] * ranks, [0.0] * ranks
    for _ in range(parts):
        clock += 2 * cluster.kernel + (3 + 2) * tensor / parts / cluster.bandwidth
        ready = [max(clock, time) for time in arrived]
        arrived = walked(cluster, ready, free, 2 * 4 * 2 * channels / parts)
    fold = cluster.kernel + 7 * 4 * ranks * 2 * channels / cluster.bandwidth
    expected = max(arrived) + fold + cluster.kernel + 3 * tensor / cluster.bandwidth
    assert scaling.forward(cluster, ranks, problem) == pytest.approx(expected, rel=1e-9)


def test_no_length_makes_ranks_worth_more_than_their_passes_allow() -> None:
    assert (scaling.ALONE, scaling.SHARDED) == (9, 20)
    for ranks in (2, 64, 1024):
        shares = [
            scaling.speedup(CLUSTER, ranks, Problem(1, 4096, 10.0**n)) / ranks for n in range(3, 16)
        ]
        assert shares == sorted(shares)
        assert shares[-1] < 0.45
        assert shares[-1] == pytest.approx(0.45, rel=1e-3)


@pytest.mark.parametrize("goal", [1.0, 20.0])
def test_the_length_from_which_ranks_are_so_much_faster(goal: float) -> None:
    def faster(time: float) -> bool:
        return scaling.speedup(CLUSTER, 64, Problem(8, 2048, time)) >= goal

    tokens = scaling.tokens_from(faster)
    assert faster(1.001 * tokens) and not faster(0.999 * tokens)


def test_the_page_has_the_tables_of_the_model() -> None:
    page = (BENCH / "README.md").read_text("utf-8")
    for table in scaling.tables():
        assert markdown(table) in page, table.title


def test_the_page_has_what_was_measured() -> None:
    """Every line of a table that the page takes from a results file is one of its report."""
    page = (BENCH / "README.md").read_text("utf-8")
    parts = re.findall(r"<!-- (results/\S+\.json) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert {file for file, _ in parts} >= {"results/cpu.json", "results/papers-characters.json"}
    for file, text in parts:
        shown = report.page(BENCH / file).splitlines()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows and set(rows) <= set(shown), file


def test_the_page_has_the_differences_of_training_over_ranks() -> None:
    page = (BENCH / "README.md").read_text("utf-8")
    runs = json.loads((BENCH / "results/distributed.json").read_text("utf-8"))["runs"]
    for run in runs.values():
        assert f"| {run['difference']:.1e} |".replace("e-0", "e-") in page
