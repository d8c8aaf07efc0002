"""``make gpu-check``: what a short time on a GPU is spent on, in this order.

Every step is a child process. It is killed with all that it started when its share of the budget is
over, and time that a step leaves goes to the later ones. ``gpu-check.json`` is written after each
step, as is ``cuda.json``, what the benchmark has found so far (``python -m bench report`` shows
it); ``gpu-check.log`` holds what the children printed. Uses the packages of its own interpreter, no
network, and what ``make gpu-prepare`` made of these sources, if it did.

``--rehearse`` goes the same way without a GPU: each step on the CPU, at tiny sizes.

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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import prepare

Result = dict[str, Any]

BUDGET = 540.0  # seconds of all steps together
OK, FAILED, UNAVAILABLE, TIMEOUT = "ok", "failed", "unavailable", "timeout"
_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("scan", "borders", "multi_state", "torch", "torch_multi_state")
)
_QUICK = "not slow and not reference and not threads and not long"
# Those that matter most come first. Not initcheck of steps: their blocks poll flags that nobody has
# written yet, on purpose.
_SANITIZED = (
    ("racecheck", "scans"),
    ("racecheck", "steps"),
    ("memcheck", "scans"),
    ("memcheck", "steps"),
    ("synccheck", "scans"),
    ("synccheck", "steps"),
    ("initcheck", "scans"),
)
_AT_ONCE = 4  # sanitizers
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_FOLDERS = re.compile(r"(?:(?<![\w./])|(?<=-I)|(?<=-L))/(?!/)(?:[\w.+@~-]+/)+")
_OUTCOMES = {"PASSED": "passed", "FAILED": "failures", "ERROR": "errors", "SKIPPED": "skipped"}
_OUTCOME = "|".join(_OUTCOMES)
_TEST = re.compile(  # with and without workers
    rf"^(?:\[gw\d+\] \[ *\d+%\] (?P<a>{_OUTCOME}) (?P<x>.*\S)"
    rf"|(?P<y>\S+::.*?) (?P<b>{_OUTCOME})\b.*)",
    re.MULTILINE,
)
_TAIL = 20  # lines of output that the results keep of a step that failed
_PATIENCE = 5.0  # seconds that a killed child may take to go
_ASK = "import json, msrnn_ops as ms; print(json.dumps([ms.backends(), ms.build_info()]))"
_FACTS = """
import json, sys, torch
from bench.cuda import gpu
sys.exit(2) if not torch.cuda.is_available() else print(json.dumps(gpu.facts()))
"""


@dataclass(frozen=True)
class Child:
    """What became of a child process."""

    status: str
    seconds: float
    output: str
    code: int | None = None

    def result(self) -> Result:
        result: Result = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.status != OK:
            result["output"] = self.output.splitlines()[-_TAIL:]
        return result


def _family(pid: int) -> list[int]:
    """A process and all that descend from it, also those that began a session of their own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has gone
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _kill(child: subprocess.Popen[bytes]) -> None:
    family = _family(child.pid)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a kernel that hangs can hold it
        child.wait(_PATIENCE)


class Check:
    """The results so far, and the time that is left."""

    def __init__(self, output: Path, rehearse: bool = False, budget: float = BUDGET) -> None:
        self.output, self.rehearse = output, rehearse
        self.benchmark: Result = {}
        self.end = self.until = time.monotonic() + budget
        self.results: Result = {
            "date": time.strftime("%Y-%m-%d"),
            "rehearsal": rehearse,
            "budget": budget,
            "machine": {},
            "steps": {},
        }
        output.mkdir(parents=True, exist_ok=True)
        (output / "gpu-check.log").write_text("", "utf-8")

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
        """Runs a child at the root of the source tree and logs its output without folders."""
        limit = self.until - time.monotonic()
        if limit < 1:
            return Child(TIMEOUT, 0.0, "no time left")
        paths = [str(prepare.PEERS), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with tempfile.TemporaryFile() as file:
            child = subprocess.Popen(
                command,
                cwd=prepare.ROOT,
                env={**os.environ, **own, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = FAILED if child.wait(limit) else OK
            except subprocess.TimeoutExpired:
                status = TIMEOUT
                _kill(child)
            file.seek(0)
            text = _FOLDERS.sub("", file.read().decode(errors="replace"))
        words = " ".join(_FOLDERS.sub("", word) for word in command)
        with (self.output / "gpu-check.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {words}\n{text}\n[{status}]\n\n")
        return Child(status, time.monotonic() - start, text, child.returncode)

    def save(self) -> None:
        write(self.output / "gpu-check.json", self.results)


def write(path: Path, results: Result) -> None:
    """At once, so that whoever is stopped here leaves the file as it was."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new.replace(path)


def capability(check: Check) -> str:
    return str(check.results["machine"].get("capability", "9.0"))


def prepared(check: Check) -> bool:
    """Whether make gpu-prepare built these sources, and for this GPU."""
    if not prepare.MANIFEST.exists():
        return False
    found = json.loads(prepare.MANIFEST.read_text("utf-8"))
    return [found["sources"], found["capability"]] == [prepare.sources(), capability(check)]


def _missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _python(*words: str) -> list[str]:
    return [sys.executable, *words]


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or where it is installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, sub) for home in homes if home for sub in ("bin", "compute-sanitizer")]
    found = [shutil.which(name), *(shutil.which(name, path=str(folder)) for folder in folders)]
    return next(filter(None, found), None)


def _nvcc_version() -> str | None:
    nvcc = _tool("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", text)
    return release[1] if release else None


def _objects(text: str) -> list[Any]:
    """The lines of an output that are JSON objects or lists."""
    found = []
    for line in text.splitlines():
        if line.startswith(("{", "[")):
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


# The steps.


def probe(check: Check) -> Result:
    """What the kernels assume of the GPU; needs neither torch nor a build."""
    with tempfile.TemporaryDirectory() as folder:
        program = prepare.PROBE
        if not prepared(check):
            if (nvcc := _tool("nvcc")) is None:
                return {"status": UNAVAILABLE, "reason": "nvcc not found"}
            program = Path(folder, "probe")
            child = check.run(prepare.probe_command(nvcc, capability(check), program))
            if child.status != OK:
                return child.result()
        child = check.run([str(program)])
    rows = [row for row in _objects(child.output) if isinstance(row, dict)]
    if child.code == 2:
        return {"status": UNAVAILABLE, "reason": child.output.strip()}
    return {**child.result(), "rows": rows}


def build(check: Check) -> Result:
    """Takes the libraries that were prepared and compiles the rest; then imports it all."""
    environment = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": capability(check),
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    result: Result = {"prepared": prepared(check), "nvcc": _nvcc_version()}
    if result["prepared"]:
        for library in (prepare.LIBRARIES / "msrnn_ops").glob("*.so"):
            shutil.copy2(library, prepare.ROOT / "msrnn_ops")
        environment["MSRNN_SKIP_OPERATORS"] = "1"
    child = check.run(_python("setup.py", "build_ext", "--inplace"), environment)
    result["compile_seconds"] = round(child.seconds, 1)
    if child.status != OK:
        missing = _missing("pybind11", "ninja", "numpy", "setuptools")
        return {**child.result(), **result, "missing": missing}
    child = check.run(_python("-c", _ASK))
    for backends, info in _objects(child.output):
        result |= {"backends": backends, "build": info}
    result = {**child.result(), **result}
    if child.status == OK and result["backends"]["cuda"] != "ok" and not check.rehearse:
        result["status"] = FAILED
    return result


def test_counts(output: str) -> Result:
    """Of what pytest -v has printed so far, by one process or many."""
    counts: Result = dict.fromkeys(_OUTCOMES.values(), 0)
    failed = []
    for match in _TEST.finditer(output):
        outcome = match["a"] or match["b"]
        counts[_OUTCOMES[outcome]] += 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(match["x"] or match["y"])
    return {**counts, "failed": failed}


def _pytest(check: Check, *options: str, **environment: str) -> Result:
    missing = _missing("pytest", "hypothesis")
    if missing:
        return {"status": UNAVAILABLE, "reason": f"not installed: {', '.join(missing)}"}
    workers = 1 if _missing("xdist") else os.cpu_count() or 1
    parallel = ["-n", str(workers)] if workers > 1 else []
    shown = ["-v", "-rN", "--tb=short", "-p", "no:cacheprovider"]
    environment = {
        "MSRNN_TEST_DEVICE": "cpu" if check.rehearse else "cuda",
        "MSRNN_TEST_EXAMPLES": "1" if check.rehearse else "15",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool for each worker would be too many
        **environment,
    }
    child = check.run(_python("-m", "pytest", *shown, *_TESTS, *parallel, *options), environment)
    return {**child.result(), "workers": workers, **test_counts(child.output)}


def test(check: Check) -> Result:
    return _pytest(check, "-m", _QUICK + (" and float32 and min_gru" if check.rehearse else ""))


def triton(check: Check) -> Result:
    """The same tests of Triton's kernels, but for dtypes that only take time to compile."""
    if _missing("triton"):
        return {"status": UNAVAILABLE, "reason": "not installed: triton"}
    interpreted = {"TRITON_INTERPRET": "1"} if check.rehearse else {}
    markers = f"{_QUICK} and not float16 and not float64"
    if check.rehearse:
        markers += " and not many_steps and float32 and min_gru"
    return _pytest(check, "-m", markers, MSRNN_BACKEND="triton", **interpreted)


def _cases(check: Check, name: str) -> list[str]:
    return _python("tests/gpu/cases.py", *(["--rehearse"] if check.rehearse else []), name)


def _sanitize(check: Check, program: str, tool: str, cases: str) -> Result:
    # Of torch's own kernels nothing is asked, and it probes the driver with calls meant to fail.
    options = ["--tool", tool, "--kernel-name", "kns=msrnn"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds of its own
    child = check.run([program, *options, *_cases(check, cases)], environment)
    summary = _SUMMARY.search(child.output)
    if child.status == TIMEOUT:
        return child.result()
    if summary is None or "Device not supported" in child.output:
        return {**child.result(), "status": UNAVAILABLE, "reason": "the tool gave no summary"}
    errors = int(summary[1])
    result = child.result()
    if errors:
        result["output"] = child.output.splitlines()[:_TAIL]
    return {**result, "status": FAILED if errors else child.status, "errors": errors}


def sanitizer(check: Check) -> Result:
    if check.rehearse:  # the cases alone: no sanitizer can run without a GPU
        children = {name: check.run(_cases(check, name)).result() for name in ("scans", "steps")}
        return {"status": _worst(children.values()), "tools": children}
    program = _tool("compute-sanitizer")
    if program is None:
        return {"status": UNAVAILABLE, "reason": "compute-sanitizer not found"}
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # they mostly wait for their own host code
        results = list(pool.map(lambda run: _sanitize(check, program, *run), _SANITIZED))
    names = (" ".join(run) for run in _SANITIZED)
    return {"status": _worst(results), "tools": dict(zip(names, results, strict=True))}


def _worst(results: Any) -> str:
    states = {result["status"] for result in results}
    return next(state for state in (FAILED, TIMEOUT, OK, UNAVAILABLE) if state in states)


def bench(check: Check, parts: str) -> Result:
    """Some parts of the benchmark, which begins no row when its time is nearly over."""
    limit = max(1.0, 0.9 * (check.until - time.monotonic()))
    with tempfile.TemporaryDirectory() as folder:
        words = ["--only", parts, "--limit", f"{limit:.0f}", "--output", folder]
        words += ["--rehearse"] if check.rehearse else []
        # A peer that torch compiles leaves a lock behind if it is killed.
        child = check.run(
            _python("-m", "bench", "cuda", *words), {"TORCH_EXTENSIONS_DIR": f"{folder}/torch"}
        )
        files = [Path(folder, f"cuda.{ending}") for ending in ("json", "partial")]
        found = [json.loads(path.read_text("utf-8")) for path in files if path.exists()]
    for part in found[:1]:  # beside those that ran before
        seconds = check.benchmark.get("seconds_taken", {}) | part["seconds_taken"]
        check.benchmark |= part | {"seconds_taken": seconds, "command": "make gpu-check"}
        write(check.output / "cuda.json", check.benchmark)
    rows = sum(len(found[0].get(part, ())) for part in parts.split(",")) if found else 0
    return {**child.result(), "rows": rows, "missing": _missing("click", "rich", "matplotlib")}


def stress(check: Check) -> Result:
    child = check.run(_cases(check, "stress"))
    rows = [row for row in _objects(child.output) if isinstance(row, dict)]
    result = child.result()
    if any(row["mismatches"] for row in rows):
        result["status"] = FAILED
    return {**result, "rows": rows}


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float  # of a budget of BUDGET; more or less where others need less or more
    run: Callable[[Check], Result]


def steps(built: bool) -> tuple[Step, ...]:
    """In order. Where nothing was prepared, compiling takes time from all others."""
    return (
        Step("probe", 20, probe),
        Step("build", 35 if built else 120, build),
        Step("test", 70, test),
        Step("triton", 80, triton),
        Step("sanitizer", 60, sanitizer),
        Step("copy", 15, partial(bench, parts="limits")),
        Step("scans", 55, partial(bench, parts="ops")),
        Step("steps", 45, partial(bench, parts="steps")),
        Step("decoding", 40, partial(bench, parts="decoding")),
        Step("backends", 40, partial(bench, parts="triton")),
        Step("peers", 40, partial(bench, parts="peers,small,layers")),
        Step("stress", 40, stress),
    )


NAMES = tuple(step.name for step in steps(True))
BENCH = ("copy", "scans", "steps", "decoding", "backends", "peers")  # what --steps bench stands for


def shares(chosen: Sequence[Step], left: Callable[[], float]) -> Iterator[tuple[Step, float]]:
    """Each step with its share of what is left when it begins."""
    for i, step in enumerate(chosen):
        yield step, left() * step.seconds / sum(later.seconds for later in chosen[i:])


def run_steps(check: Check, chosen: Sequence[Step]) -> None:
    for step, share in shares(chosen, lambda: check.end - time.monotonic()):
        start = time.monotonic()
        check.until = start + share
        try:
            result = step.run(check)
        except Exception:
            problem = _FOLDERS.sub("", traceback.format_exc())
            result = {"status": FAILED, "output": problem.splitlines()[-_TAIL:]}
        taken = round(time.monotonic() - start, 1)
        check.results["steps"][step.name] = result | {"seconds": taken, "limit": round(share, 1)}
        check.save()
        print(_summary(step.name, check.results["steps"][step.name]), flush=True)


def _summary(name: str, result: Result) -> str:
    words = [f"{name:10} {result['status']:12}{result['seconds']:6.0f} of {result['limit']:.0f} s"]
    words += [f"{result[key]} {key}" for key in _OUTCOMES.values() if key in result]
    words += [f"{tool} {found['status']}" for tool, found in result.get("tools", {}).items()]
    rows = result.get("rows")
    if name == "stress" and rows is not None:
        words.append(f"{sum(row['mismatches'] for row in rows)} mismatches")
    elif rows is not None:
        words.append(f"{rows if isinstance(rows, int) else len(rows)} rows")
    words += [result["reason"]] if "reason" in result else []
    return ", ".join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--steps", default="", help=f"some of {','.join(NAMES)}; bench: {','.join(BENCH)}")
    add("--budget", type=float, default=BUDGET, help="seconds of all of them (%(default)s)")
    add("--output", type=Path, help="folder (bench/results, of a rehearsal build/rehearsal)")
    add("--rehearse", action="store_true", help="without a GPU, at tiny sizes")
    arguments = parser.parse_args()
    wanted = set(arguments.steps.replace("bench", ",".join(BENCH)).split(",")) - {""}
    if unknown := wanted - set(NAMES):
        parser.error(
            f"--steps: expected some of {','.join(NAMES)},bench, got {','.join(sorted(unknown))}"
        )
    arguments.steps = wanted or set(NAMES)
    default = "build/rehearsal" if arguments.rehearse else "bench/results"
    arguments.output = (arguments.output or prepare.ROOT / default).resolve()
    return arguments


def main() -> int:
    arguments = _arguments()
    check = Check(arguments.output, arguments.rehearse, arguments.budget)
    if check.rehearse:
        print("a rehearsal on the CPU: nothing here is a result", flush=True)
    else:
        child = check.run(_python("-c", _FACTS))
        if child.code == 2:
            (check.output / "gpu-check.log").unlink()
            print("tests/gpu/check.py: needs a GPU, and torch sees none here", file=sys.stderr)
            return 2
        check.results["machine"] = next(iter(_objects(child.output)), {"unknown": child.result()})
    check.results["prepared"] = prepared(check)
    check.save()
    table = steps(check.results["prepared"])
    run_steps(check, [step for step in table if step.name in arguments.steps])
    states = {result["status"] for result in check.results["steps"].values()}
    return int(bool(states & {FAILED, TIMEOUT}))


if __name__ == "__main__":
    sys.exit(main())
