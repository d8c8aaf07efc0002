"""``make gpu-check``, as far as a machine without a GPU can tell: order, limits, what is kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cuda import gpu
from tests.gpu import check as gpu_check
from tests.gpu import prepare

ORDER = (
    *("probe", "build", "test", "triton", "sanitizer"),
    *("copy", "scans", "steps", "decoding", "backends", "peers", "stress"),
)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text("utf-8"))
    return found


def given(steps: Sequence[gpu_check.Step], budget: float, taken: Sequence[float]) -> list[float]:
    """The seconds that steps may take, which take so many."""
    passed: list[float] = []
    shares = gpu_check.shares(steps, lambda: budget - sum(passed))
    found = []
    for (_, share), seconds in zip(shares, taken, strict=True):
        found.append(share)
        passed.append(seconds)
    return found


def test_the_order_and_the_budget() -> None:
    for built in (True, False):
        assert tuple(step.name for step in gpu_check.steps(built)) == ORDER
    assert sum(step.seconds for step in gpu_check.steps(True)) == gpu_check.BUDGET == 540
    everything = gpu_check.steps(True)
    taken = [step.seconds for step in everything]
    assert given(everything, 540, taken) == pytest.approx(taken)  # each takes all that it may
    three = [gpu_check.Step(name, 10.0, gpu_check.probe) for name in "abc"]
    assert given(three, 60, [4, 4, 4]) == [20, 28, 52]


def test_a_child_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """The grandchild has a session of its own, as the workers of torch's compiler may."""
    check = gpu_check.Check(tmp_path, rehearse=True)
    check.until = time.monotonic() + 1.5
    code = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    child = check.run([sys.executable, "-c", code])
    assert time.monotonic() - start < 60
    assert child.status == gpu_check.TIMEOUT
    grandchild = int(child.output)  # what it printed before is kept
    end = time.monotonic() + 10
    while is_running(grandchild) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(grandchild)
    assert check.run([sys.executable, "-c", "print(1)"]).status == gpu_check.TIMEOUT  # time is up
    assert str(grandchild) in (tmp_path / "gpu-check.log").read_text("utf-8")


def test_results_are_there_after_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = gpu_check.Check(tmp_path, rehearse=True, budget=100)

    def good(_: gpu_check.Check) -> gpu_check.Result:
        return {"status": gpu_check.OK, "rows": 3}

    def broken(_: gpu_check.Check) -> gpu_check.Result:
        assert list(saved(tmp_path)["steps"]) == ["good"]
        raise RuntimeError("of no use")

    def last(_: gpu_check.Check) -> gpu_check.Result:
        found = saved(tmp_path)["steps"]["broken"]
        assert found["status"] == gpu_check.FAILED
        assert found["output"][-1] == "RuntimeError: of no use"
        return {"status": gpu_check.OK}

    functions = {"good": good, "broken": broken, "last": last}
    gpu_check.run_steps(check, [gpu_check.Step(name, 10.0, run) for name, run in functions.items()])
    found = saved(tmp_path)
    assert found["rehearsal"] is True
    states = {name: result["status"] for name, result in found["steps"].items()}
    assert states == {"good": "ok", "broken": "failed", "last": "ok"}, found
    assert {"seconds", "limit"} <= set(found["steps"]["last"])
    assert "broken     failed" in capsys.readouterr().out


def test_what_pytest_had_done_when_it_was_stopped() -> None:
    serial = (
        "tests/test_scan.py::test_a[1-float32] PASSED                 [ 10%]\n"
        "tests/test_scan.py::test_b SKIPPED (there is no second GPU)  [ 20%]\n"
        "tests/test_scan.py::test_c[x y] FAILED                       [ 30%]\n"
        "tests/test_scan.py::test_d "
    )
    parallel = (
        "tests/test_scan.py::test_a[1-float32] \n"
        "[gw1] [  1%] PASSED tests/test_scan.py::test_a[1-float32] \n"
        "[gw0] [ 12%] SKIPPED tests/test_scan.py::test_b \n"
        "[gw11] [100%] FAILED tests/test_scan.py::test_c[x y] \n"
    )
    expected = {"passed": 1, "failures": 1, "errors": 0, "skipped": 1}
    for output in (serial, parallel):
        found = gpu_check.test_counts(output)
        assert found == {**expected, "failed": ["tests/test_scan.py::test_c[x y]"]}


def test_parts_of_the_benchmark_gather_in_one_file(tmp_path: Path) -> None:
    """Each marked as a rehearsal, so that none of its numbers is taken for a GPU's."""
    pytest.importorskip("click")
    pytest.importorskip("rich")
    check = gpu_check.Check(tmp_path, rehearse=True)
    check.until = check.end
    for parts in ("limits", "small"):
        result = gpu_check.bench(check, parts)
        assert result["status"] == gpu_check.OK, result
    found = json.loads((tmp_path / "cuda.json").read_text("utf-8"))
    assert found["rehearsal"] is True and found["limits"] and found["small"]
    assert set(found["seconds_taken"]) == {"limits", "small"}
    assert found["machine"]["gpu"]["name"] == "no GPU: a rehearsal on the CPU"


def test_what_was_prepared_is_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu_check.Check(tmp_path)
    monkeypatch.setattr(prepare, "MANIFEST", tmp_path / "bundle.json")
    assert not gpu_check.prepared(check)
    ours = {"sources": prepare.sources(), "capability": "9.0"}
    for found, fits in (
        (ours, True),
        ({**ours, "sources": "of another day"}, False),
        ({**ours, "capability": "8.0"}, False),
    ):
        prepare.MANIFEST.write_text(json.dumps(found))
        assert gpu_check.prepared(check) == fits
    check.results["machine"]["capability"] = "8.0"
    assert gpu_check.prepared(check)


def test_the_command_line(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tests/gpu/check.py", "--output", str(tmp_path), *words]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=prepare.ROOT, env=env, capture_output=True, text=True)

    refused = run("--steps", "build,tests")
    assert refused.returncode == 2
    assert "--steps: expected some of probe,build,test," in refused.stderr
    assert refused.stderr.endswith("got tests\n")
    without = run("--steps", "build,bench")
    assert without.returncode == 2 and "torch sees none here" in without.stderr
    assert not list(tmp_path.iterdir())


def test_the_host_side_names_no_macro_that_torch_2_11_lacks() -> None:
    """The CUDA operators' host side is compiled with 2.11 by make gpu-prepare alone."""
    known = {"STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX"}
    known |= {"TORCH_ERROR_CODE_CHECK", "TORCH_SUCCESS"}
    sources = [*(prepare.ROOT / "csrc").rglob("*.h"), *(prepare.ROOT / "csrc").rglob("*.cpp")]
    text = "".join(path.read_text("utf-8") for path in sources)
    assert set(re.findall(r"\b(?:STABLE|STD|TORCH|C10|AT|AOTI)_[A-Z_]+\b", text)) == known


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 leaves its allocator and its generator of random numbers in that capture.

    The one has to be told, and the other is freed by a capture that succeeds.
    """
    began: list[int] = []
    ended: list[tuple[int, int]] = []
    released: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def graph(_: object, pool: int, __: object) -> Iterator[None]:
        began.append(pool)
        yield
        if len(began) == 1:
            raise RuntimeError("an operation that cannot be captured")

    pools = itertools.count(7)
    for name, value in {
        "graph": graph,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: next(pools),
        "current_stream": lambda: None,
        "current_device": lambda: 3,
        "synchronize": lambda: None,
        "_sleep": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, found in {"_cuda_endAllocateToPool": ended, "_cuda_releasePool": released}.items():
        monkeypatch.setattr(
            torch._C, name, lambda *pair, found=found: found.append(pair), raising=False
        )
    device, calls = gpu.Gpu.__new__(gpu.Gpu), []
    replay, captured = device.captured(lambda: calls.append(1), 2)
    assert not captured and calls == [1, 1]  # of the capture
    replay()
    assert calls == [1, 1, 1, 1]
    assert began == [7, 8] and ended == released == [(3, 7)]
