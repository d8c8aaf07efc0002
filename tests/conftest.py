"""What holds for every test: the kernels they run on, fresh inputs, markers, and what is printed.

The inputs of the scans are in scans.py, the choice of kernels in backends.py, other processes in
processes.py.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench, after whichever msrnn_ops is installed

import backends
from processes import run as run
from scans import Scan, poison

backends.choose()
EXAMPLES = int(os.environ.get("MSRNN_TEST_EXAMPLES", 60))
hypothesis.settings.register_profile("ci", deadline=None, max_examples=EXAMPLES)
hypothesis.settings.load_profile("ci")

DTYPES = {"float32", "float64", "bfloat16", "float16"}


def _markers(item: pytest.Item) -> Iterator[str]:
    """What a case is about: its dtype, its op, the reference in place of kernels."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        if isinstance(value, str) and value in DTYPES | {"reference"}:
            yield value
        elif isinstance(value, Scan):
            yield value.name


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in _markers(item):
        item.add_marker(name)


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On Triton's interpreter, where an operation takes 0.1 ms: some of the cases of each test.

    Of the comparison with float64 they are some of each scan.
    """
    if not backends.INTERPRETED:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.split("[")[0]
        if name.endswith("test_against_float64"):
            name += item.callspec.params["scan"].name
        cases.setdefault(name, []).append(item)
    chosen: list[pytest.Item] = []
    for name, own in cases.items():
        chosen += random.Random(name).sample(own, min(len(own), 5 if "float64" in name else 3))
    items[:] = chosen


@pytest.fixture(autouse=True)
def fresh_inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh random inputs in every run; MSRNN_TEST_SEED repeats one."""
    seed = int(os.environ.get("MSRNN_TEST_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    poison()
    yield


class Lines:
    """A line for each file that is done, in place of dots: several runs can share a terminal."""

    def __init__(self, label: str) -> None:
        self._label, self._file, self._start = label, "", 0.0
        self._counts: Counter[str] = Counter()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.split("::")[0]
        if file != self._file:
            self._print()
            self._file, self._start = file, time.perf_counter()

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
        if report.failed:
            print(f"{self._label}: failed: {report.nodeid}", flush=True)
            return None
        return report.outcome if report.when == "call" else "", "", ""

    def pytest_sessionfinish(self) -> None:
        self._print()

    def _print(self) -> None:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self._counts.items()))
        if counts:
            seconds = time.perf_counter() - self._start
            print(f"{self._label}: {self._file}: {counts} in {seconds:.0f} s", flush=True)
        self._counts.clear()


def pytest_configure(config: pytest.Config) -> None:
    if label := os.environ.get("MSRNN_TEST_LABEL"):
        config.pluginmanager.register(Lines(label))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        seed = dict(item.user_properties).get("seed")
        report.sections.append(("inputs", f"repeat with MSRNN_TEST_SEED={seed}"))
