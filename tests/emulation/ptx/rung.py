"""``python tests/emulation/ptx/rung.py [PART...]``: what nvcc emits, executed on the CPU.

The parts, all of them by default:
  cases      every case of ../driver.cpp and ../step_driver.cpp on the PTX for each architecture:
             right, and the same bits whatever shared memory and registers held before, and with
             another schedule. The worst error of each op and dtype goes into results.json
  thread     the quick cases under ThreadSanitizer, warps as strict as CUDA documents them
  mutations  each bug of mutations/ planted into the PTX of a kernel: all must be noticed;
             mutations=NAME plants those whose name matches the pattern
``--archs 80,90`` takes some architectures only.

A mutation is a text file: a title, where it is planted, what notices it, the cases to run,
and regular expressions with what takes their place:
  # title
  object: scan_float32          of which of nvcc's objects, or triton, for Triton's kernels
  kernel: MinGruILb0.*Lb0EE     a part of the name of one of its kernels
  which: 2                      the second match in that kernel, or all; the first if left out
  caught: values                or bits, dead-lock, thread, or words of the machine's report
  cases: NAME...
  - old
  + new
ptxas must take the planted text: it is a kernel that a GPU would run.

Needs nvcc. Exit code 1 if any part fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import check
import nvcc
from check import CLAIMED, STRICT, Failure, Result, expect_success, run, schedule
from machine import BUILD, HERE

RESULTS = HERE / "results.json"
POISON = ("255", "60")  # NaN, and small positive numbers
SCHEDULES = [(0, 4), (2, 2), (3, 4), (1, 9), (2, 1), (3, 2), (2, 5)]  # shuffling, resident blocks
JOBS = os.cpu_count() or 1
TRITON = "triton"  # stands for what Triton compiles, among the objects of nvcc


def triton_python() -> Path:
    """The newest environment that the Makefile made with Triton, beside this Python's packages."""
    found = sorted(Path(sys.prefix).glob("triton-*/bin/python"))
    if not found:
        raise Failure("no environment with Triton: make ptx makes one")
    return found[-1]


def in_parallel(calls: Iterable[Callable[[], Result]]) -> list[Result]:
    with ThreadPoolExecutor(JOBS) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def run_driver(
    name: str, program: Path, *arguments: str, limit: float = check.LIMIT_SECONDS, **settings: str
) -> Result:
    if name == "step_driver":  # a row may wait for its blocks beside three other such grids
        settings["EMULATION_CLAIMED"] = str(4 * int(settings.get("EMULATION_RESIDENT", "4")))
    return run(program, *arguments, limit=limit, **{**CLAIMED[name], **settings})


# Every case.


@dataclass
class Worst:
    """Of the cases of an op in a dtype."""

    cases: int = 0
    error: float = 0.0


def errors_of(result: Result) -> dict[str, float]:
    """By the name of a case: op/direction/dtype/... of scans, shape/policy/mode/dtype of steps."""
    lines = (line.split() for line in result.output.splitlines())
    return {line[2]: float(line[1]) for line in lines if len(line) >= 3 and len(line[0]) == 16}


def op_of(driver: str, case: str) -> str:
    parts = case.split("/")
    if driver == "driver":
        return "/".join(parts[:3])
    (dtype,) = (part for part in parts if part in nvcc.DTYPES)
    return f"attend_evict/forward/{dtype}"


def cases(archs: list[str]) -> str:
    worst: dict[str, Worst] = {}
    for arch in archs:
        for name in check.DRIVERS:
            program = nvcc.driver(name, arch)
            runs = [{"EMULATION_POISON": POISON[0]}, {"EMULATION_POISON": POISON[1]}]
            runs[1] |= schedule(2, int(arch), 3)
            first, second = in_parallel(
                lambda s=s, n=name, p=program: run_driver(n, p, limit=1800, **s) for s in runs
            )
            for result in (first, second):
                expect_success(result)
            for case, bits in first.hashes().items():
                if second.hashes()[case] != bits:
                    raise Failure(f"{case} on sm_{arch}: other bits with {runs[1]}")
            for case, error in errors_of(first).items():
                of = worst.setdefault(op_of(name, case), Worst())
                of.cases += 1
                of.error = max(of.error, error)
    if archs == list(nvcc.ARCHS):
        save(worst)
    total = sum(of.cases for of in worst.values())
    return f"{total} cases for sm_{', sm_'.join(archs)}, the same bits with other poison and order"


def save(worst: dict[str, Worst]) -> None:
    """A line for each op, direction and dtype: its cases on all architectures, and the worst error.

    Errors are relative to the largest value of a tensor, and beyond the rounding of its dtype.
    """
    rows = ",\n".join(f'  "{op}": [{of.cases}, {of.error}]' for op, of in sorted(worst.items()))
    head = {"nvcc": nvcc.version(), "archs": nvcc.ARCHS, "fields": ["cases", "worst error"]}
    text = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
    RESULTS.write_text(f'{{\n{text} "cases": {{\n{rows}\n }}\n}}\n')


def thread(archs: list[str]) -> str:
    total = 0
    for name in check.DRIVERS:
        program = nvcc.driver(name, archs[0], "thread")
        orders = "2" if name == "driver" else "23"  # 3: warps starve, and find flags set at once
        results = in_parallel(
            lambda s=s, n=name, p=program: run_driver(
                n, p, "--quick", limit=900, EMULATION_SHUFFLE=s, **STRICT
            )
            for s in orders
        )
        for result in results:
            expect_success(result)
        total += len(results[0].hashes())
    return f"{total} cases for sm_{archs[0]}, no race"


# Planted bugs.


@dataclass
class Mutation:
    name: str
    title: str
    settings: dict[str, str] = field(default_factory=dict)
    replaced: list[tuple[str, str]] = field(default_factory=list)

    @property
    def driver(self) -> str:
        if self.settings["object"] == TRITON:
            return TRITON
        return "driver" if self.settings["object"].startswith("scan") else "step_driver"

    @property
    def sanitizer(self) -> str:
        return "thread" if self.settings["caught"] == "thread" else ""


def read_mutation(path: Path) -> Mutation:
    lines = path.read_text().splitlines()
    mutation = Mutation(path.stem, lines[0].removeprefix("# "))
    for line in filter(None, lines[1:]):
        if line.startswith("- "):
            mutation.replaced.append((line[2:], ""))
        elif line.startswith("+"):
            mutation.replaced[-1] = (mutation.replaced[-1][0], line[2:])
        else:
            key, _, value = line.partition(": ")
            mutation.settings[key] = value
    return mutation


def replace(text: str, old: str, new: str, which: str) -> str:
    """The text of a kernel with a match, or all of them, replaced."""
    found = list(re.finditer(old, text, re.M))
    chosen = found if which == "all" else found[int(which) - 1 : int(which)]
    if not chosen:
        raise Failure(f"{old!r} occurs {len(found)} times")
    for match in reversed(chosen):
        text = text[: match.start()] + match.expand(new) + text[match.end() :]
    return text


def plant(mutation: Mutation, text: str) -> str:
    """A module of one kernel with the bug."""
    entries = [m.start() for m in re.finditer(r"^\.visible \.entry", text, re.M)] + [len(text)]
    pattern = mutation.settings["kernel"]
    spans = list(itertools.pairwise(entries))
    chosen = [s for s in spans if re.search(pattern, text[slice(*s)].split("(")[0])]
    if len(chosen) != 1:
        raise Failure(f"{len(chosen)} kernels are called like {pattern}")
    ((begin, end),) = chosen
    kernel = text[begin:end]
    for old, new in mutation.replaced:
        kernel = replace(kernel, old, new, mutation.settings.get("which", "1"))
    return text[: entries[0]] + kernel


def assemble(path: Path, ptxas: str) -> None:
    (target,) = re.findall(r"^\.target (\w+)", path.read_text(), re.M)
    command = [ptxas, f"-arch={target}", "-O0", str(path), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"no PTX: {done.stderr}")


def noticed_in(result: Result) -> str:
    """What a run says: nothing if it is content."""
    if "ThreadSanitizer: data race" in result.output:
        return "thread"
    reports = [line for line in result.output.splitlines() if line.startswith("cuda_on_cpu: ")]
    if reports:
        return reports[0].removeprefix("cuda_on_cpu: ")
    if result.code is None:
        return "no end"
    return "values" if "WRONG" in result.output else f"exit code {result.code}" * bool(result.code)


def assembled(mutation: Mutation, text: str, ptxas: str = "ptxas") -> Path:
    """A file of one kernel of this module, with the bug, which ptxas takes."""
    path = BUILD / "mutations" / f"{mutation.name}.ptx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plant(mutation, text))
    assemble(path, ptxas)
    return path


def command_of(mutation: Mutation, path: Path, arch: str) -> tuple[list[Path], dict[str, str]]:
    """What runs its cases, and in which environment."""
    if mutation.driver == TRITON:
        settings = {"EMULATION_TRITON_EDIT": str(path), "MSRNN_TEST_TRITON": arch}
        return [triton_python(), HERE / "triton_cases.py"], settings
    text = nvcc.text_of(BUILD / f"sm_{arch}" / f"{mutation.settings['object']}.o")
    settings = {"EMULATION_PTX": str(assembled(mutation, text)), **CLAIMED[mutation.driver]}
    return [nvcc.driver(mutation.driver, arch, mutation.sanitizer)], settings


def check_mutation(path: Path, arch: str) -> str:
    """What went wrong, or nothing."""
    mutation = read_mutation(path)
    started = time.monotonic()
    wanted = mutation.settings["caught"]
    noticed: set[str] = set()
    hashes = set()
    try:
        (program, *script), given = command_of(mutation, path, arch)
    except Failure as failure:
        return f"{path.name}: {failure}"
    given |= {**STRICT, "EMULATION_SPINS": "200000", "TSAN_OPTIONS": "halt_on_error=1 symbolize=0"}
    cases = mutation.settings["cases"].split()
    for seed, (shuffle, resident) in enumerate(SCHEDULES):
        settings = given | schedule(shuffle, seed, resident)
        settings["EMULATION_POISON"] = POISON[seed % 2]
        result = run(program, *map(str, script), *cases, **settings)
        hashes.add(str(result.hashes()))
        if said := noticed_in(result):
            noticed.add(said)
        elif len(hashes) > 1:
            noticed.add("bits")
        if any(wanted in said for said in noticed):
            break
    found = "; ".join(sorted(noticed)) or "nothing"
    print(f"  {time.monotonic() - started:4.0f} s  {found[:50]:50} {mutation.title}", flush=True)
    caught = any(wanted in said for said in noticed)
    return "" if caught else f"{path.name}: wanted {wanted}, noticed {found}"


def mutations(archs: list[str], chosen: str = "*") -> str:
    paths = sorted((HERE / "mutations").glob(f"{chosen}.txt"))
    arch = "90" if "90" in archs else archs[0]
    planted = [read_mutation(path) for path in paths]
    for driver, sanitizer in sorted({(m.driver, m.sanitizer) for m in planted}):
        if driver == TRITON:  # the cases without a bug
            wanted = " ".join(m.settings["cases"] for m in planted if m.driver == TRITON).split()
            expect_success(run(triton_python(), str(HERE / "triton_cases.py"), *set(wanted)))
        else:  # before they are wanted twice at once
            nvcc.driver(driver, arch, sanitizer)
    with ThreadPoolExecutor(JOBS) as pool:
        wrong = [text for text in pool.map(lambda p: check_mutation(p, arch), paths) if text]
    if wrong or not paths:
        raise Failure("\n".join(wrong) or "no such mutation")
    return f"{len(paths)} planted bugs noticed"


PARTS: dict[str, Callable[[list[str]], str]] = {
    "cases": cases,
    "thread": thread,
    "mutations": mutations,
}


def climb(name: str, archs: list[str]) -> bool:
    started = time.monotonic()
    part, _, chosen = name.partition("=")
    try:
        said = mutations(archs, chosen) if chosen else PARTS[part](archs)
        passed = True
    except Failure as failure:
        said, passed = f"FAILED\n{failure}", False
    print(f"ptx: {name:10} {time.monotonic() - started:5.0f} s  {said}", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--archs", default=",".join(nvcc.ARCHS), help="default: %(default)s")
    options = parser.parse_args()
    if unknown := [p for p in options.parts if p.partition("=")[0] not in PARTS]:
        parser.error(f"no such part: {' '.join(unknown)}")
    archs = options.archs.split(",")
    return 0 if all([climb(part, archs) for part in options.parts]) else 1


if __name__ == "__main__":
    sys.exit(main())
