"""What many GPUs gain by sharing one sequence: ``python -m bench estimates scaling``.

A cost model of ``msrnn_ops.distributed.min_gru``, forward and backward. A rank finds the decay and
the last state of its shard, an all-gather brings those of all R ranks, every rank folds them into
the state that enters its shard, and scans the shard from there; backward is the mirror image. What
is sent does not depend on the length, but a shard is read more often than a whole sequence is.

Nothing of this was measured: no machine of several GPUs was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.table import Table, number

STATE = 4  # bytes of a number of a state
ELEMENT = 2  # bytes of a number of a sequence
CHANNELS_TO_HALVE = 1024  # from here on one half is gathered while the other one is scanned

# Tensors of the size of a shard that min_gru reads and writes: on one GPU, and on a rank.
PASSES = {
    "forward: last state of the shard": (0, 3),
    "forward: decay of the shard": (0, 2),
    "forward: scan from the entering state": (3, 3),
    "backward: adjoint that leaves the shard": (0, 6),
    "backward: gradients from the entering adjoint": (6, 6),
}
ALONE, SHARDED = (sum(column) for column in zip(*PASSES.values(), strict=True))


@dataclass(frozen=True)
class Link:
    latency: float  # seconds
    bandwidth: float  # bytes/s in each direction


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. The defaults are a DGX H100 and its network, from the sources named beside."""

    bandwidth: float = 0.85 * 0.9 * 3.35e12  # of a pass: 0.85 of what an H100 copies
    kernel: float = 3e-6  # launch and drain of a scan: an estimate
    call: float = 8e-6  # a collective besides its hops: 6.6 to 8.4 in NCCL's tuning.cc
    inner: Link = Link(3e-6, 450e9)  # a hop: 0.6 to 3.4 µs in the same file; NVLink 4
    outer: Link = Link(10e-6, 50e9)  # a hop: 2.7 to 14 µs; InfiniBand NDR, a card for each GPU
    node: int = 8

    def gather(self, ranks: int, size: float) -> float:
        """A ring: everybody passes on what came last. One ring goes through each network card."""
        hops, links = ranks - 1, self.inner
        borders = ranks // self.node if ranks > self.node else 0
        bandwidth = min(self.outer.bandwidth * self.node, links.bandwidth)
        if not borders:
            bandwidth = links.bandwidth
        latency = (hops - borders) * links.latency + borders * self.outer.latency
        return self.call + latency + hops * size / bandwidth

    def fold(self, ranks: int, states: int, numbers: int) -> float:
        """All summaries read, joined and scanned by every rank."""
        return self.kernel + numbers * STATE * ranks * states / self.bandwidth


@dataclass(frozen=True)
class Problem:
    batch: int
    channels: int
    time: float  # steps of the whole sequence

    @property
    def states(self) -> int:
        return self.batch * self.channels

    def tensor(self, ranks: int) -> float:
        """Bytes of a shard."""
        return self.states * self.time / ranks * ELEMENT


def alone(cluster: Cluster, problem: Problem) -> float:
    """Seconds of forward and backward on one GPU that holds the whole sequence."""
    return 2 * cluster.kernel + ALONE * problem.tensor(1) / cluster.bandwidth


def forward(cluster: Cluster, ranks: int, problem: Problem) -> float:
    halves = 2 if problem.channels >= CHANNELS_TO_HALVE else 1
    tensor = problem.tensor(ranks) / cluster.bandwidth
    summary = 2 * cluster.kernel + 5 * tensor / halves
    gather = cluster.gather(ranks, 2 * STATE * problem.states / halves)
    both = summary + gather + (max(summary, gather) if halves == 2 else 0)
    return both + cluster.fold(ranks, problem.states, 7) + cluster.kernel + 3 * tensor


def backward(cluster: Cluster, ranks: int, problem: Problem) -> float:
    passes = 2 * cluster.kernel + 12 * problem.tensor(ranks) / cluster.bandwidth
    gather = cluster.gather(ranks, STATE * problem.states)
    return passes + gather + cluster.fold(ranks, problem.states, 3)


def speedup(cluster: Cluster, ranks: int, problem: Problem) -> float:
    """Of so many ranks over one GPU."""
    taken = forward(cluster, ranks, problem) + backward(cluster, ranks, problem)
    return alone(cluster, problem) / taken


def tokens_from(holds: Callable[[float], bool]) -> float:
    """The length from which something holds."""
    low, high = 1.0, 1e12
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


_GPUS = (8, 64, 256, 1024)
_STATES = ((1, 4096), (8, 2048))


def _passes() -> Table:
    rows = [[name, *map(str, counts)] for name, counts in PASSES.items()]
    rows.append(["together", str(ALONE), str(SHARDED)])
    note = "Tensors of B·T/R·D numbers that min_gru reads and writes."
    return Table("Local passes", note, ("pass", "one GPU", "each of R ranks"), rows)


def _efficiency(cluster: Cluster) -> Table:
    rows = []
    for batch, channels in _STATES:
        for time in (10**6, 10**7, 10**8):
            problem = Problem(batch, channels, time)
            shares = [speedup(cluster, ranks, problem) / ranks for ranks in _GPUS]
            label = f"{batch}×{channels}, {time // 10**6} M"
            rows.append([label, *(f"{share:.0%}" for share in shares)])
    note = (
        "bfloat16, forward and backward: the speed of R GPUs over R times that of one GPU which "
        f"holds the whole sequence. The passes alone allow {ALONE}/{SHARDED} = "
        f"{ALONE / SHARDED:.0%}."
    )
    columns = ("B×D, T", *(f"{ranks} GPUs" for ranks in _GPUS))
    return Table("Efficiency", note, columns, rows)


def _length(cluster: Cluster, ranks: int, batch: int, channels: int, goal: float) -> str:
    """The tokens from which so many ranks are `goal` times as fast as one GPU."""
    tokens = tokens_from(
        lambda time: speedup(cluster, ranks, Problem(batch, channels, time)) >= goal
    )
    unit, name = (1e3, "k") if tokens < 1e6 else (1e6, "M")
    return f"{number(tokens / unit, 2)} {name}"


def _lengths(cluster: Cluster) -> Table:
    rows = []
    for batch, channels in _STATES:
        faster = [_length(cluster, ranks, batch, channels, 1) for ranks in _GPUS]
        rows.append([f"{batch}×{channels}, faster than one GPU", *faster])
        near = [_length(cluster, ranks, batch, channels, 0.4 * ranks) for ranks in _GPUS]
        rows.append([f"{batch}×{channels}, 0.4 R times as fast", *near])
    columns = ("B×D", *(f"{ranks} GPUs" for ranks in _GPUS))
    return Table("Lengths", "From so many tokens of a sequence on R GPUs are", columns, rows)


def tables(cluster: Cluster | None = None) -> list[Table]:
    cluster = cluster or Cluster()
    return [_passes(), _efficiency(cluster), _lengths(cluster)]
