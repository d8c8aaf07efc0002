"""Inputs, oracle and comparisons that the tests share."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

import msrnn_ops as ms
from msrnn_ops import backend
from msrnn_ops.operators import multi_state

sys.path.append(str(Path(__file__).parents[1]))  # bench, after whichever msrnn_ops is installed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.repair()
if "MSRNN_TEST_KERNELS" in os.environ:  # the CUDA kernels, emulated, in place of the CPU's
    torch.ops.load_library(os.environ["MSRNN_TEST_KERNELS"])
    for name, function in multi_state.ON_DEVICE.items():
        backend.LIBRARIES[backend.COMPILED].impl(name, function, "CPU", allow_override=True)
if "MSRNN_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["MSRNN_TEST_DEVICE"])

RANKS = 4
TIMEOUT = 60.0  # seconds: of a rank that waits
EXAMPLES = int(os.environ.get("MSRNN_TEST_EXAMPLES", 60))
hypothesis.settings.register_profile("ci", deadline=None, max_examples=EXAMPLES)
hypothesis.settings.load_profile("ci")


@dataclass(frozen=True)
class Scan:
    """An op under test: its name, its function, and how its inputs are drawn."""

    name: str
    function: Callable[..., Tensor]
    draw: tuple[Callable[[Tensor], Tensor], ...]  # standard normal -> input
    joint: bool = False

    def inputs(self, batch: int, time: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
        parts = [f(torch.randn(batch, time, channels, dtype=torch.float64)) for f in self.draw]
        parts = [x.to(dtype) for x in parts]
        return [torch.cat(parts, -1)] if self.joint else parts

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.function(*args, **kwargs)


def _same(x: Tensor) -> Tensor:
    return x


SCANS = [
    Scan("linear_scan", ms.linear_scan, (torch.tanh, _same)),
    Scan("decay_scan", ms.decay_scan, (lambda x: -x.abs(), _same)),
    Scan("log_scan", ms.log_scan, (lambda x: -x.abs(), _same)),
    Scan("min_gru", ms.min_gru, (_same, _same)),
    Scan("min_gru_identity", partial(ms.min_gru, activation="identity"), (_same, _same)),
    Scan("min_lstm", ms.min_lstm, (_same, _same, _same)),
    Scan("min_lstm_identity", partial(ms.min_lstm, activation="identity"), (_same,) * 3),
    Scan("min_gru_joint", ms.min_gru_joint, (_same, _same), joint=True),
    Scan("min_lstm_joint", ms.min_lstm_joint, (_same, _same, _same), joint=True),
]
scans = pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.name)

# Shapes (B, T, D): nothing, one step, odd sizes, whole vectors, and both plans of the kernels (few
# channels and many steps: tiles of time in parallel; many channels: a walk).
SHAPES = [(2, 0, 3), (0, 4, 3), (2, 5, 0), (1, 1, 1), (3, 1, 7), (2, 37, 33), (5, 64, 48)]
SHAPES += [(1, 300, 130), (2, 400, 100), (1, 40, 1100)]
if INTERPRETED:
    SHAPES = [*SHAPES[:6], (7, 9, 48), (1, 130, 130)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@contextmanager
def reference() -> Iterator[None]:
    """The reference backend on one thread: its tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ms.use_backend("reference"):
            yield
    finally:
        torch.set_num_threads(threads)


def oracle(scan: Scan, inputs: list[Tensor], h0: Tensor | None = None, **options: object) -> Tensor:
    """The same call in float64, one step at a time."""
    wide = [x.double() for x in inputs]
    with reference():
        return scan(*wide, None if h0 is None else h0.double(), **options)


def norm_error(x: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm, of numbers of size 0.5 at least on average."""
    assert x.shape == exact.shape
    size = max(exact.norm().item(), 0.5 * max(exact.numel(), 1) ** 0.5)
    return (x.double() - exact).norm().item() / size


def gradients(
    scan: Scan,
    inputs: list[Tensor],
    h0: Tensor | None,
    weights: tuple[Tensor, Tensor],
    **options: object,
) -> tuple[list[Tensor], list[Tensor]]:
    """([h, last], gradients of inputs and h0) of a weighted sum of all states and last states."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *([] if h0 is None else [h0]))]
    state = leaves[-1] if h0 is not None else None
    h, last = scan(*leaves[: len(inputs)], state, return_state=True, **options)
    total = (h.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    total = total + sum(0 * x.double().sum() for x in leaves)  # at T = 0 nothing else ties them
    return [h.detach(), last.detach()], list(torch.autograd.grad(total, leaves))


def poison() -> None:
    """Leaves NaN in the memory that the next outputs are likely to be given."""
    for size in (1 << 8, 1 << 12, 1 << 16):
        blocks = [torch.full((size,), torch.nan) for _ in range(8)]
        del blocks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On Triton's interpreter, where an operation takes 0.1 ms: some of the cases of each test."""
    if not INTERPRETED:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    chosen: list[pytest.Item] = []
    for name, own in cases.items():
        most = 48 if name.endswith("test_against_float64") else 3
        chosen += random.Random(name).sample(own, min(len(own), most))
    items[:] = chosen


@pytest.fixture(autouse=True)
def fresh_inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh random inputs in every run; MSRNN_TEST_SEED repeats one."""
    seed = int(os.environ.get("MSRNN_TEST_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    poison()
    yield


def _enter(rank: int, work: Callable[..., None], ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(minutes=3)  # on a busy machine ranks start far apart
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=patience
    )
    work(rank)
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """run(work, ranks): work(rank) in so many processes; what one of them raises is raised here."""

    def start(work: Callable[..., None], ranks: int = 4) -> None:
        (tmp_path / "store").unlink(missing_ok=True)
        processes.spawn(_enter, (work, ranks, str(tmp_path / "store")), ranks)

    yield start


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        seed = dict(item.user_properties).get("seed")
        report.sections.append(("inputs", f"repeat with MSRNN_TEST_SEED={seed}"))
