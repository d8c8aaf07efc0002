"""Child processes of ``tests/gpu/check.py``: short calls for the sanitizers, and a stress test.

``cases.py scans`` and ``cases.py steps`` make every kernel run once or twice on small tensors.
``cases.py stress`` repeats long scans, whose blocks hand the state on to one another, and steps of
large states, whose blocks wait for each other, under load and from two streams, and compares every
repetition with the first bit by bit. ``--rehearse`` before these words does what a CPU can do of
it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import msrnn_ops as ms
from bench import peers
from bench.cuda.gpu import worst_error
from bench.peers import Shape
from bench.step_peers import Heads, Tokens, error_of_step, full_state

_DTYPES = (torch.float32, torch.bfloat16)
_SANITIZED: tuple[Shape, ...] = ((2, 300, 40), (1, 3000, 64), (3, 77, 33), (1, 1, 5))
# Ends of sequences side by side: one step, none, odd lengths; and how many steps there are.
_PACKED = (9, 10, 130, 130, 701, 890)
_PACKED_STEPS = 900
_HEADS = (Heads(8, 2, 64), Heads(6, 1, 136), Heads(4, 4, 8))
_STRESSED: tuple[Shape, ...] = ((1, 1 << 20, 64), (2, 300_000, 100))
# Batch and slots: a grid that fits, one that takes tickets, and rows too large for either.
_STRESSED_STATES: tuple[tuple[int, int], ...] = ((1, 8192), (24, 4096), (3, 40_000))
_REPETITIONS = 200
_PRODUCTS = 4  # matrix products beside each repetition
_WIDTH = 4096  # of those matrices
_SAMPLE = 16  # channels whose error is taken
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest error


# The sanitizers.


def _sanitize(
    op: peers.Op, shape: Shape, dtype: torch.dtype, device: torch.device, packed: bool
) -> None:
    """Drawn on the CPU, so that hardly any kernel but ours runs under the tool."""
    rows = len(_PACKED) - 1 if packed else shape[0]
    inputs = [x.detach().to(device).requires_grad_() for x in op.draw(shape, dtype)]
    state = torch.zeros(rows, shape[-1]).to(device).requires_grad_()
    ends = torch.tensor(_PACKED).to(device) if packed else None
    resets = (torch.rand(shape[:2]) < 0.02).to(device)
    grads = torch.randn(shape).to(dtype).to(device), torch.randn(rows, shape[-1]).to(device)
    for reverse in (False, True):
        options = {"reverse": reverse, "cu_seqlens": ends, "resets": resets if reverse else None}
        outputs = op.ours(*inputs, state, **options, return_state=True)
        torch.autograd.grad(outputs, (*inputs, state), grads)


def scans(device: torch.device) -> None:
    shapes = [(shape, False) for shape in _SANITIZED] + [((1, _PACKED_STEPS, 40), True)]
    cases = list(itertools.product(peers.OPS.values(), shapes, _DTYPES))
    for op, (shape, packed), dtype in cases:
        _sanitize(op, shape, dtype, device, packed)
    print(len(cases), "cases")


def steps(device: torch.device) -> None:
    """A prompt, tokens, the two halves of a token, and a sequence with its gradients."""
    slots, batch, time = 70, 2, 90
    policies = ms.Policy.tova(slots), ms.Policy.h2o(slots, recent=9, scope="head")
    cases = list(itertools.product(_HEADS, policies, (*_DTYPES, torch.float16)))
    for heads, policy, dtype in cases:

        def draw(*times: int, heads: Heads = heads, dtype: Any = dtype) -> list[Tensor]:
            counts = heads.query, heads.kv, heads.kv
            drawn = [torch.randn(batch, n, *times, heads.dim) for n in counts]
            return [x.to(dtype).to(device) for x in drawn]

        state = ms.MultiState(
            policy, batch=batch, kv_heads=heads.kv, head_dim=heads.dim, dtype=dtype, device=device
        )
        q, k, v = draw(time)
        ms.attend_prompt(q, k, v, state)
        for _ in range(3):
            q, k, v = draw()
            ms.attend_evict(q, k, v, state)
            ms.evict(state, ms.attend_scores(q, k, v, state)[1])
        rows = torch.arange(batch, device=device).flip(0)
        rows[-1] = -1
        ms.attend_evict(q, k, v, state, rows=rows)
        ms.evict(state, ms.attend_scores(q, k, v, state, rows=rows)[1], rows=rows)
        q, k, v = (x.requires_grad_() for x in draw(time))
        out, _ = ms.attend_sequence(q, k, v, policy)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    print(len(cases), "cases")


# Stress.


class _Case(ABC):
    """What is repeated, and what it gave the first time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    first: tuple[Tensor, ...]

    @abstractmethod
    def outputs(self) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def error(self) -> float:
        """Against float64."""

    def differs(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Whether any bit does, on the device: nothing waits for the host."""
        pairs = zip(outputs, self.first, strict=True)
        return torch.stack(
            [(x.view(torch.uint8) != y.view(torch.uint8)).any() for x, y in pairs]
        ).any()


class _Scan(_Case):
    """A scan forward and backward."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.op, self.shape, self.dtype, self.device = peers.OPS["min_gru"], shape, dtype, device
        with device:
            self.inputs = self.op.draw(shape, dtype)
            self.grad = torch.randn(shape).to(dtype)
        self.first = self.outputs()

    def outputs(self) -> tuple[Tensor, ...]:
        h = self.op.ours(*self.inputs)
        return (h.detach(), *torch.autograd.grad(h, self.inputs, self.grad))

    def error(self) -> float:
        def sample(x: Tensor) -> Tensor:
            return x.detach()[:1, :, :_SAMPLE].cpu()

        h, grads = peers.truth(self.op, tuple(map(sample, self.inputs)), sample(self.grad))
        return worst_error([sample(x) for x in self.first], (h, *grads))


class _Steps(_Case):
    """Some tokens of a full state."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype, self.device = shape, dtype, device
        batch, slots = shape
        with device:
            self.state = full_state(ms.Policy.h2o(slots, recent=slots // 2), batch, dtype)
            self.tokens = Tokens.draw(batch, dtype)
        self.first = self.outputs()

    def outputs(self) -> tuple[Tensor, ...]:
        state = torch.utils._pytree.tree_map(torch.clone, self.state)
        outs = [ms.attend_evict(*token, state) for token in self.tokens.drawn[:3]]
        return (*outs, state.position, state.score, state.free)

    def error(self) -> float:
        state = torch.utils._pytree.tree_map(torch.clone, self.state)
        return error_of_step(state, Tokens(list(self.tokens.drawn)))


def _alone(case: _Case, count: Tensor) -> None:
    for _ in range(_REPETITIONS):
        count += case.differs(case.outputs())


def _beside_products(case: _Case, count: Tensor) -> None:
    """Another stream keeps multiprocessors busy, so that blocks start late and out of step."""
    side = torch.cuda.Stream()
    x = torch.randn(_WIDTH, _WIDTH, device=case.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(_REPETITIONS):
        with torch.cuda.stream(side):
            for _ in range(_PRODUCTS):
                torch.mm(x, x, out=y)
        count += case.differs(case.outputs())
    torch.cuda.current_stream().wait_stream(side)


def _two_streams(case: _Case, count: Tensor) -> None:
    """Two at once compete for the multiprocessors."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    counts = [torch.zeros_like(count) for _ in streams]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(_REPETITIONS // len(streams)):
        for stream, mine in zip(streams, counts, strict=True):
            with torch.cuda.stream(stream):
                mine += case.differs(case.outputs())
    for stream, mine in zip(streams, counts, strict=True):
        torch.cuda.current_stream().wait_stream(stream)
        count += mine


def _replayed(case: _Case, count: Tensor) -> None:
    """Whatever the kernels keep between launches has to be made ready inside the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.outputs()
    for _ in range(_REPETITIONS):
        for x in outputs:
            x.view(torch.uint8).fill_(0xFF)
        graph.replay()
        count += case.differs(outputs)


_MODES: dict[str, Callable[[_Case, Tensor], None]] = {
    "alone": _alone,
    "beside matrix products": _beside_products,
    "two streams": _two_streams,
    "replayed graph": _replayed,
}


def _blocks(case: _Case) -> int | None:
    """Of the largest launch, where the profiler can tell."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            case.outputs()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text("utf-8"))["traceEvents"]
        grids = [event["args"]["grid"] for event in events if "grid" in event.get("args", {})]
        return max(math.prod(grid) for grid in grids)
    except Exception:
        return None


def _stress_case(case: _Case) -> Iterator[dict[str, Any]]:
    head = {"shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    error = case.error()
    wrong = not error < _TOLERANCE[case.dtype]
    yield {**head, "mode": "against float64", "error": error, "mismatches": int(wrong)}
    for mode, repeat in _MODES.items():
        count = torch.zeros((), dtype=torch.int64, device=case.device)
        repeat(case, count)
        yield {**head, "mode": mode, "repetitions": _REPETITIONS, "mismatches": int(count)}


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def stress(device: torch.device) -> None:
    cases: list[Callable[[], _Case]] = [
        partial(kind, shape, dtype, device)
        for kind, shapes in ((_Steps, _STRESSED_STATES), (_Scan, _STRESSED))
        for shape, dtype in itertools.product(shapes, _DTYPES)
    ]
    for make in cases:
        for row in _stress_case(make()):
            _say(row)
        torch.cuda.empty_cache()
    for make in cases:  # last: a profiler slows launches
        case = make()
        head = {"shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
        _say({**head, "mode": "largest launch", "blocks": _blocks(case), "mismatches": 0})


def _shrink() -> None:
    """To what is done in seconds on a CPU, which has neither streams nor graphs."""
    global _REPETITIONS, _SANITIZED, _STRESSED, _STRESSED_STATES
    _REPETITIONS, _SANITIZED = 3, ((2, 30, 5),)
    _STRESSED, _STRESSED_STATES = ((1, 300, 17),), ((2, 40),)
    for mode in list(_MODES)[1:]:
        del _MODES[mode]


def main() -> None:
    what = {"scans": scans, "steps": steps, "stress": stress}
    match sys.argv[1:]:
        case ["--rehearse", name] if name in what:
            _shrink()
            what[name](torch.device("cpu"))
        case [name] if name in what:
            what[name](torch.device("cuda"))
        case _:
            raise SystemExit("usage: cases.py [--rehearse] scans | steps | stress")


if __name__ == "__main__":
    main()
