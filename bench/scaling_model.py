"""A cost model of the scans over ranks: ranks with clocks, links with latency and bandwidth.

The simulation advances clocks message by message. That is exact without a queue of events: a rank
runs its program in order, and its port sends one message at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Ranks: TypeAlias = NDArray[np.int64]

CHANNELS_TO_HALVE = 1024  # one half's summary is gathered while the other half is scanned
STATE = 4  # bytes of a number of a state


@dataclass(frozen=True)
class Link:
    latency: float  # seconds
    bandwidth: float  # bytes/s in each direction

    def time(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Ranks on nodes: a rank has an `inner` link to those of its node and an `outer` one beyond."""

    scan: float  # bytes/s of a local scan
    decay: float  # of one that finds the decay alone
    backward: float  # of one that finds all gradients
    kernel: float  # seconds of a scan, however short
    call: float  # seconds of a collective or of a message besides its latency
    inner: Link
    outer: Link
    node: int  # ranks
    overlap: bool = True  # messages travel while ranks compute

    def flat(self, link: Link) -> Machine:
        """The same with one kind of link."""
        return replace(self, inner=link, outer=link, node=1)

    def slower(self, computing: float, sending: float) -> Machine:
        """The same with every time so many times as long."""

        def slow(link: Link) -> Link:
            return Link(link.latency * sending, link.bandwidth / sending)

        return replace(
            self,
            scan=self.scan / computing,
            decay=self.decay / computing,
            backward=self.backward / computing,
            kernel=self.kernel * computing,
            call=self.call * sending,
            inner=slow(self.inner),
            outer=slow(self.outer),
        )


@dataclass(frozen=True)
class Problem:
    batch: int
    time: int  # steps of the whole sequence
    channels: int
    element: int = 2  # bytes

    @property
    def states(self) -> int:
        return self.batch * self.channels


@dataclass(frozen=True)
class Plan:
    """How many tensors of its shard a rank reads and writes in each local pass of min_gru."""

    last: int  # to find the last state from 0
    decay: int
    adjoint: int  # what leaves the shard in backward
    scan: int = 3  # gate, candidate; h
    gradients: int = 6  # grad_h, gate, candidate, h; two gradients
    halves: bool = True  # from so many channels on


NOW = Plan(last=3, decay=2, adjoint=6)  # whole ops, of which only the last state is used
ONE_GATHER = replace(NOW, halves=False)
READ_ONLY = replace(ONE_GATHER, last=2, decay=0, adjoint=2)  # gate, candidate; grad_h, gate


class Network:
    """The ports of all ranks."""

    def __init__(self, machine: Machine, ranks: int) -> None:
        self.machine, self.ranks = machine, np.arange(ranks)
        self.free = np.zeros(ranks)  # when each port can send again

    def links(self, to: Ranks, striped: bool = False) -> tuple[Array, Array]:
        """Latency and bandwidth from each rank; striped: by all outer links of its node."""
        machine = self.machine
        inside = self.ranks // machine.node == to // machine.node
        outer = machine.outer.bandwidth
        if striped and machine.node > 1:
            outer = min(outer * machine.node, machine.inner.bandwidth)
        latency = np.where(inside, machine.inner.latency, machine.outer.latency)
        return latency, np.where(inside, machine.inner.bandwidth, outer)

    def send(
        self, ready: Array, to: Ranks, size: float, times: int = 1, striped: bool = False
    ) -> Array:
        """When each rank has what is sent to it, which it passes on so many times."""
        latency, bandwidth = self.links(to, striped)
        busy = size / bandwidth
        for _ in range(times):
            self.free = np.maximum(ready, self.free) + busy
            ready = np.empty_like(ready)
            ready[to] = self.free + latency
        return ready


def ring_gather(network: Network, ready: Array, size: float) -> Array:
    """Every rank passes on what it got last. NCCL lays one such ring through each network card."""
    ranks = network.ranks
    to = (ranks + 1) % len(ranks)
    return network.send(ready + network.machine.call, to, size, len(ranks) - 1, striped=True)


def rail_gather(network: Network, ready: Array, size: float) -> Array:
    """A ring among the ranks of the same place in each node, then one within each node."""
    ranks, call = network.ranks, network.machine.call
    node = min(network.machine.node, len(ranks))
    nodes = len(ranks) // node
    ready = network.send(ready + call, (ranks + node) % len(ranks), size, nodes - 1)
    to = ranks // node * node + (ranks + 1) % node
    return network.send(ready + call, to, size * nodes, node - 1)


def doubling_gather(network: Network, ready: Array, size: float) -> Array:
    """Partners at distance 1, 2, 4, ... exchange all that they have."""
    ready = ready + network.machine.call
    for distance in _distances(network):
        partner = network.ranks ^ distance
        ready = np.maximum(ready, network.send(ready, partner, size * distance))
    return ready


def doubling_scan(network: Network, ready: Array, size: float) -> Array:
    """The same partners, who compose the maps of their groups at once: sizes do not grow."""
    machine = network.machine
    for distance in _distances(network):
        ready = ready + machine.call
        arrived = network.send(ready, network.ranks ^ distance, size)
        ready = np.maximum(ready, arrived) + _composition(machine, size)
    return ready


def chain(network: Network, ready: Array, size: float) -> Array:
    """Every rank sends the state that leaves it to the next."""
    machine, ready = network.machine, ready.copy()
    for rank in range(len(ready) - 1):
        inside = rank // machine.node == (rank + 1) // machine.node
        link = machine.inner if inside else machine.outer
        arrived = ready[rank] + machine.kernel + machine.call + link.time(size)
        ready[rank + 1] = max(ready[rank + 1], arrived)
    return ready


def _distances(network: Network) -> list[int]:
    doublings = doublings_of(len(network.ranks))
    return [1 << k for k in range(doublings)]


def doublings_of(ranks: int) -> int:
    if ranks & (ranks - 1):
        raise ValueError(f"doubling: expected a power of 2 of ranks, got {ranks}")
    return ranks.bit_length() - 1


def _composition(machine: Machine, size: float) -> float:
    """Of the group's and of the prefix's map with one that came: four are read, two written."""
    return machine.kernel + 6 * size / machine.scan


@dataclass(frozen=True)
class Exchange:
    name: str
    run: Callable[[Network, Array, float], Array]
    numbers: tuple[int, int]  # per state that a message starts with, forward and backward
    gathers: bool = True  # then every rank folds the summaries of all


RING = Exchange("ring all-gather", ring_gather, (2, 1))
RAILS = Exchange("all-gather by rails", rail_gather, (2, 1))
DOUBLING = Exchange("doubling all-gather", doubling_gather, (2, 1))
SCAN = Exchange("doubling scan", doubling_scan, (2, 2), gathers=False)
CHAIN = Exchange("chain of carries", chain, (1, 1), gathers=False)
EXCHANGES = (RING, RAILS, DOUBLING, SCAN, CHAIN)


def fold(machine: Machine, ranks: int, states: int, backward: bool = False) -> float:
    """All summaries: joined (forward), then scanned; two numbers of a state read, one written."""
    size = (12 if backward else 16 + 12) * ranks * states
    return machine.kernel + size / machine.scan


def exchange_time(machine: Machine, ranks: int, states: int, exchange: Exchange) -> float:
    """Seconds of the exchange of forward alone, with its fold."""
    size = STATE * exchange.numbers[0] * states
    taken = float(exchange.run(Network(machine, ranks), np.zeros(ranks), size).max())
    return taken + (fold(machine, ranks, states) if exchange.gathers else 0.0)


def simulate(
    machine: Machine,
    ranks: int,
    problem: Problem,
    plan: Plan = NOW,
    exchange: Exchange = RING,
    backward: bool = False,
) -> float:
    """Seconds of one pass of min_gru, until the last rank is done."""
    network, clock = Network(machine, ranks), np.zeros(ranks)
    halves = plan.halves and not backward and problem.channels >= CHANNELS_TO_HALVE
    blocks = 2 if halves else 1
    tensor = problem.states * problem.time / ranks * problem.element
    if backward:
        summary, last = plan.adjoint / machine.backward, plan.gradients / machine.backward
    else:
        summary, last = (
            plan.last / machine.scan + plan.decay / machine.decay,
            plan.scan / machine.scan,
        )
    kernels = 1 if backward else (plan.last > 0) + (plan.decay > 0)
    size = STATE * exchange.numbers[backward] * problem.states / blocks
    arrived = clock
    for _ in range(blocks):
        clock = clock + kernels * machine.kernel + summary * tensor / blocks
        arrived = exchange.run(network, np.maximum(clock, arrived), size)
        if not machine.overlap:
            clock = arrived
    clock = np.maximum(clock, arrived)
    if exchange.gathers:
        clock = clock + fold(machine, ranks, problem.states, backward)
    return float(clock.max()) + machine.kernel + last * tensor


def alone(machine: Machine, problem: Problem, backward: bool = False) -> float:
    """Seconds of one pass on one rank that holds the whole sequence."""
    tensor = problem.states * problem.time * problem.element
    work = NOW.gradients / machine.backward if backward else NOW.scan / machine.scan
    return machine.kernel + work * tensor


def ring_time(machine: Machine, ranks: int, size: float) -> float:
    """Closed form of a ring's all-gather on links of one kind."""
    return machine.call + (ranks - 1) * machine.outer.time(size)


def doubling_time(machine: Machine, ranks: int, size: float) -> float:
    link = machine.outer
    latencies = doublings_of(ranks) * link.latency
    return machine.call + latencies + (ranks - 1) * size / link.bandwidth


def scan_time(machine: Machine, ranks: int, size: float) -> float:
    step = machine.call + machine.outer.time(size) + _composition(machine, size)
    return doublings_of(ranks) * step


def crossover(machine: Machine, states: int, exchange: Exchange) -> float:
    """The number of ranks from which a doubling scan takes less time than this all-gather.

    With links of one kind both take equally long where slope R + offset = step log2 R; that is
    R = -W(-k 2^(offset / step)) / k with k = slope ln 2 / step and Lambert's W, lower branch.
    1 where there is no such R: the scan is faster for any number.
    """
    link, size = machine.outer, 2 * STATE * states
    sent = size / link.bandwidth
    per_rank = fold(machine, 1, states) - fold(machine, 0, states)
    slope, offset = sent + per_rank, machine.call + fold(machine, 0, states) - sent
    step = machine.call + sent + _composition(machine, size)
    if exchange is RING:
        slope, offset, step = slope + link.latency, offset - link.latency, step + link.latency
    elif exchange is not DOUBLING:
        raise ValueError(f"crossover: expected the ring or the doubling, got {exchange.name}")
    k = slope * math.log(2) / step
    x = math.log(k) + offset / step * math.log(2)  # of -W's argument
    if x >= -1:
        return 1.0
    w = 1 - x  # Newton's steps to the larger root of w - log w + x, w = -W
    for _ in range(40):
        w *= (math.log(w) - x - 1) / (w - 1)
    return w / k
