"""The cost model of the scans over ranks: simulation against formulas, page against script."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest

pytest.importorskip("rich")  # bench's, not the package's

from bench import scaling
from bench import scaling_model as model
from bench.scaling_model import Link, Machine, Problem

MACHINE = Machine(
    scan=2e12,
    decay=3e12,
    backward=1e12,
    kernel=3e-6,
    call=8e-6,
    inner=Link(3e-6, 450e9),
    outer=Link(10e-6, 50e9),
    node=8,
)
LINKS = [MACHINE.inner, MACHINE.outer, Link(1e-3, 1e6)]


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("link", LINKS)
def test_simulation_is_the_formula_on_links_of_one_kind(ranks: int, link: Link) -> None:
    machine, states = MACHINE.flat(link), 4096
    size = 8 * states
    fold = model.fold(machine, ranks, states)
    expected = {
        model.RING: model.ring_time(machine, ranks, size) + fold,
        model.DOUBLING: model.doubling_time(machine, ranks, size) + fold,
        model.SCAN: model.scan_time(machine, ranks, size),
        model.CHAIN: (ranks - 1) * (machine.kernel + machine.call + link.time(size / 2)),
    }
    for exchange, time in expected.items():
        found = model.exchange_time(machine, ranks, states, exchange)
        assert found == pytest.approx(time, rel=1e-9), exchange.name


def test_rails_use_both_kinds_of_links() -> None:
    size = 8 * 4096
    expected = 2 * MACHINE.call + 3 * MACHINE.outer.time(size) + 7 * MACHINE.inner.time(4 * size)
    found = model.exchange_time(MACHINE, 32, 4096, model.RAILS)
    assert found == pytest.approx(expected + model.fold(MACHINE, 32, 4096), rel=1e-9)


@pytest.mark.parametrize("link", LINKS)  # the gather hides behind the scans, or they behind it
@pytest.mark.parametrize("overlap", [True, False])
def test_halves_of_channels_overlap(link: Link, overlap: bool) -> None:
    machine, ranks = replace(MACHINE.flat(link), overlap=overlap), 4
    problem = Problem(2, 1 << 20, 2048)
    tensor = 2 * 2048 * (1 << 20) // ranks * 2
    scans = 2 * machine.kernel + tensor / 2 * (3 / machine.scan + 2 / machine.decay)
    gather = model.ring_time(machine, ranks, 8 * 4096 / 2)
    both = scans + gather + (max(scans, gather) if overlap else scans + gather)
    rest = model.fold(machine, ranks, 4096) + machine.kernel + 3 * tensor / machine.scan
    assert model.simulate(machine, ranks, problem) == pytest.approx(both + rest, rel=1e-9)


@pytest.mark.parametrize("states", [4096, 16384, 65536])
@pytest.mark.parametrize("link", LINKS[:2])
@pytest.mark.parametrize("exchange", [model.RING, model.DOUBLING])
def test_crossover_is_where_the_curves_meet(
    states: int, link: Link, exchange: model.Exchange
) -> None:
    machine = MACHINE.flat(link)
    ranks = model.crossover(machine, states, exchange)

    def lead(doublings: int) -> float:
        """Of the scan, in the simulation."""
        count = 1 << doublings
        gather, scan = (
            model.exchange_time(machine, count, states, e) for e in (exchange, model.SCAN)
        )
        return gather - scan

    doublings = math.log2(ranks)
    assert all((lead(n) > 0) == (n > doublings) for n in range(2, 11))
    if ranks == 1:
        return

    size = 8 * states
    scan = doublings * model.scan_time(machine, 2, size)
    hops = ranks - 1 if exchange is model.RING else doublings
    gather = machine.call + hops * link.latency + (ranks - 1) * size / link.bandwidth
    gather += machine.kernel + 28 * ranks * states / machine.scan
    assert gather == pytest.approx(scan, rel=1e-9)


def test_doubling_wants_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="expected a power of 2 of ranks, got 6"):
        model.exchange_time(MACHINE, 6, 8, model.SCAN)


def made_up(machine: Machine, contention: float) -> dict[str, Any]:
    """What a machine that behaves as the model says would have measured."""
    rows: list[dict[str, Any]] = []

    def add(name: str, ranks: int, seconds: float, **what: Any) -> None:
        rows.append({"name": name, "ranks": ranks, **what, "median": seconds})

    for ranks in (2, 4):
        turns = ranks / 2
        shared = machine.slower(contention * turns, turns)
        for steps in (4, 1024, 65536):
            problem = Problem(1, steps, 512, element=4)
            tensor = steps // ranks * 512 * 4
            forward = machine.kernel + 3 * tensor / machine.scan
            times = {
                "forward": forward,
                "decay": machine.kernel + 2 * tensor / machine.decay,
                "both": forward + machine.kernel + 6 * tensor / machine.backward,
            }
            for name, time in times.items():
                add(f"local {name} alone", ranks, time, **asdict(problem))
                add(f"local {name}", ranks, time * contention * turns, **asdict(problem))
            whole = [model.simulate(shared, ranks, problem, backward=b) for b in (False, True)]
            add("whole forward", ranks, whole[0], **asdict(problem))
            add("whole both", ranks, sum(whole), **asdict(problem))
        for size in (1 << 10, 1 << 20):
            add("gather", ranks, turns * (ranks - 1) * machine.outer.time(size), size=size)
    return {"machine": {"cores": 2}, "rows": rows}


def test_fit_finds_the_machine_that_was_measured() -> None:
    link = Link(3e-4, 9e8)
    machine = Machine(15e9, 5e9, 20e9, 1e-4, 0.0, link, link, node=1, overlap=False)
    results = made_up(machine, contention=1.3)
    fitted = scaling.fit(results)
    assert len(fitted.alone) == 6
    for found in fitted.alone.values():
        for name in ("scan", "decay", "backward", "kernel"):
            assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=1e-6), name
    assert vars(fitted.link) == pytest.approx(vars(link))
    assert fitted.contention == pytest.approx(1.3)
    rows = scaling.predictions(results)
    assert len(rows) == 12
    for row in rows:
        assert row["simulated"] == pytest.approx(row["measured"], rel=1e-6)


def test_page_is_what_the_script_makes() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    results = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
    values = {a.name: a.value for a in scaling.ASSUMPTIONS}
    parts = scaling.page_parts(values, results)
    assert scaling.filled(page, parts) == page
    with pytest.raises(ValueError, match="expected the parts"):
        scaling.filled(page, {**parts, "more": ""})
