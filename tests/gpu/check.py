"""``make gpu-check``: builds for this GPU, tests, sanitizes, stresses and measures.

Uses the packages of its own interpreter and no network. Every step is a child process with a time
limit; all of them together stay within nine minutes. ``gpu-check.json`` is written after every step
and ``gpu-check.log`` holds what the children printed.

Exit status: 0 if no step failed, 1 if one did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.cpp_extension import CUDA_HOME

from bench.cuda import gpu

Result = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 525.0  # of all steps together
_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("scan", "borders", "torch", "multi_state", "torch_multi_state")
)
# Not initcheck of steps: their blocks poll flags that nobody has written yet, on purpose.
_TOOLS = {
    "memcheck": ("scans", "steps"),
    "racecheck": ("scans", "steps"),
    "synccheck": ("scans", "steps"),
    "initcheck": ("scans",),
}
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_FOLDERS = re.compile(r"(?:(?<![\w./])|(?<=-I)|(?<=-L))/(?!/)(?:[\w.+@~-]+/)+")
_TAIL = 20  # lines of output that the results keep of a step that failed
OK, FAILED, UNAVAILABLE, TIMEOUT = "ok", "failed", "unavailable", "timeout"


@dataclass(frozen=True)
class Child:
    """What became of a child process."""

    status: str
    seconds: float
    output: str

    def result(self) -> Result:
        result: Result = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.status != OK:
            result["output"] = self.output.splitlines()[-_TAIL:]
        return result


@dataclass
class Check:
    """The machine, the results so far and the time that is left."""

    output: Path
    results: Result
    end: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    def run(
        self, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Runs a child at the root of the source tree and logs its output without folders."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 1:
            return Child(TIMEOUT, 0.0, "no time left")
        start = time.monotonic()
        with tempfile.TemporaryFile() as file:
            child = subprocess.Popen(
                command,
                cwd=_ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = FAILED if child.wait(limit) else OK
            except subprocess.TimeoutExpired:
                status = TIMEOUT
                os.killpg(child.pid, signal.SIGKILL)  # with what the child has started
                child.wait()
            file.seek(0)
            text = _FOLDERS.sub("", file.read().decode(errors="replace"))
        words = " ".join(_FOLDERS.sub("", word) for word in command)
        with (self.output / "gpu-check.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {words}\n{text}\n[{status}]\n\n")
        return Child(status, time.monotonic() - start, text)

    def save(self) -> None:
        text = json.dumps(self.results, indent=1, ensure_ascii=False)
        (self.output / "gpu-check.json").write_text(text + "\n", "utf-8")


def _missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _python(*words: str) -> list[str]:
    return [sys.executable, *words]


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or beside its compiler."""
    folders = [Path(CUDA_HOME, "bin"), Path(CUDA_HOME, "compute-sanitizer")] if CUDA_HOME else []
    found = [shutil.which(name), *(shutil.which(name, path=str(folder)) for folder in folders)]
    return next(filter(None, found), None)


def _nvcc_version() -> str | None:
    nvcc = _tool("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", text)
    return release[1] if release else None


def build(check: Check) -> Result:
    environment = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": check.results["machine"]["capability"],
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    command = _python("setup.py", "build_ext", "--inplace")
    child = check.run(command, 300, environment)
    facts = {"nvcc": _nvcc_version(), "missing": _missing("pybind11", "ninja", "numpy")}
    return {**child.result(), **facts}


def _counts(report: Path) -> Result:
    """The counts and the failures of a JUnit report."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts: Result = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failed = []
    for suite in suites:
        for key in ("tests", "failures", "errors", "skipped"):
            counts[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**counts, "failed": failed}


def _pytest(check: Check, *options: str, **environment: str) -> Result:
    missing = _missing("pytest", "hypothesis")
    if missing:
        return {"status": UNAVAILABLE, "reason": f"not installed: {', '.join(missing)}"}
    workers = 1 if _missing("xdist") else os.cpu_count() or 1
    parallel = ["-n", str(workers)] if workers > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        command = _python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS, *parallel, *options
        )
        environment = {"MSRNN_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1", **environment}
        child = check.run([*command, f"--junitxml={report}"], 300, environment)
        counts = _counts(report) if report.exists() else {}
    return {**child.result(), "workers": workers, **counts}


def test(check: Check) -> Result:
    return _pytest(check)


def triton(check: Check) -> Result:
    """The same tests of Triton's kernels, but for dtypes that only take time to compile."""
    import msrnn_ops as ms  # built by now

    if (state := ms.backends()["triton"]) != "ok":
        return {"status": UNAVAILABLE, "reason": state}
    return _pytest(
        check, "-k", "(bfloat16 or not float16-) and not float64-", MSRNN_BACKEND="triton"
    )


def _sanitize(check: Check, program: str, tool: str, cases: str) -> Result:
    options = ["--tool", tool]
    if tool == "memcheck":  # torch probes the driver with calls that are meant to fail
        options += ["--report-api-errors", "no"]
    case = _python("tests/gpu/cases.py", cases)
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds of its own
    child = check.run([program, *options, *case], 60, environment)
    summary = _SUMMARY.search(child.output)
    if child.status == TIMEOUT:
        return {**child.result(), "status": UNAVAILABLE, "reason": "timeout"}
    if summary is None or "Device not supported" in child.output:
        return {**child.result(), "status": UNAVAILABLE, "reason": "the tool gave no summary"}
    errors = int(summary[1])
    result = child.result()
    if errors:
        result["output"] = child.output.splitlines()[:_TAIL]
    return {**result, "status": FAILED if errors else child.status, "errors": errors}


def sanitizer(check: Check) -> Result:
    program = _tool("compute-sanitizer")
    if program is None:
        return {"status": UNAVAILABLE, "reason": "compute-sanitizer not found"}
    with ThreadPoolExecutor() as pool:  # side by side: they mostly wait for their own host code
        runs = [(tool, cases) for tool, both in _TOOLS.items() for cases in both]
        results = pool.map(lambda run: _sanitize(check, program, *run), runs)
    tools = {f"{tool} {cases}": found for (tool, cases), found in zip(runs, results, strict=True)}
    states = {result["status"] for result in tools.values()}
    status = next(state for state in (FAILED, OK, UNAVAILABLE) if state in states)
    return {"status": status, "tools": tools}


def stress(check: Check) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stress.json")
        child = check.run(_python("tests/gpu/cases.py", "stress", str(path)), 60)
        rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    result = child.result()
    if any(row["mismatches"] for row in rows):
        result["status"] = FAILED
    return {**result, "rows": rows}


def bench(check: Check) -> Result:
    command = _python("-m", "bench", "cuda", "--output", str(check.output))
    return {**check.run(command, _SECONDS).result(), "missing": _missing("click", "rich")}


_STEPS: dict[str, Callable[[Check], Result]] = {
    "build": build,
    "test": test,
    "triton": triton,
    "sanitizer": sanitizer,
    "stress": stress,
    "bench": bench,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--parts", default=",".join(_STEPS), help="in this order (%(default)s)")
    add("--output", type=Path, default=Path("bench/results"), help="folder (%(default)s)")
    arguments = parser.parse_args()
    parts = [part for part in arguments.parts.split(",") if part]
    unknown = [part for part in parts if part not in _STEPS]
    if unknown:
        parser.error(f"--parts: expected some of {','.join(_STEPS)}, got {','.join(unknown)}")
    arguments.parts = parts
    return arguments


def _summary(name: str, result: Result) -> str:
    words = [f"{name:10} {result['status']:12}{result['seconds']:6.0f} s"]
    words += [f"{result[key]} {key}" for key in ("tests", "failures", "errors") if key in result]
    words += [f"{tool} {found['status']}" for tool, found in result.get("tools", {}).items()]
    if "rows" in result:
        words.append(f"{sum(row['mismatches'] for row in result['rows'])} mismatches")
    words += [result["reason"]] if "reason" in result else []
    return ", ".join(words)


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available():
        print("tests/gpu/check.py: needs a GPU, and torch sees none here", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = gpu.facts(torch.device("cuda"))
    head = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "steps": {}}
    check = Check(arguments.output.resolve(), head)
    (check.output / "gpu-check.log").write_text("", "utf-8")
    for name in arguments.parts:
        start = time.monotonic()
        result = _STEPS[name](check)
        result["seconds"] = round(time.monotonic() - start, 1)
        check.results["steps"][name] = result
        check.save()
        print(_summary(name, result), flush=True)
    states = {result["status"] for result in check.results["steps"].values()}
    return int(bool(states & {FAILED, TIMEOUT}))


if __name__ == "__main__":
    sys.exit(main())
