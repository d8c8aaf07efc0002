"""``python tests/emulation/check.py [RUNG...]``: proves the scan kernels on the emulator.

The rungs, all of them by default:
  selftest   the emulator itself, and that it notices the mistakes planted in its selftest
  schedules  every case of driver.cpp under many schedules: right, and the same bits under all
  address    the quick cases under AddressSanitizer and UndefinedBehaviorSanitizer
  thread     the quick cases under ThreadSanitizer, warps as strict as CUDA documents them
  mutations  each bug of tests/mutations planted into a copy of the kernel: all must be noticed;
             mutations=NAME runs those whose name matches the pattern
and, only if named:
  undefined  every case under UndefinedBehaviorSanitizer alone

A mutation is a text file: a title, the file it edits, what notices it (values, bits, dead-lock,
address, thread), the cases to run, and lines to replace, which must occur just once:
  # title
  file: csrc/cuda/scan.cuh
  caught: values
  cases: NAME...
  - old line
  + new line

Needs a C++20 compiler ($CXX or g++) and nothing else. Exit code 1 if any rung fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/emulation"
BUILD = ROOT / "build/emulation"
DTYPES = ("float32", "bfloat16", "float64", "float16")
SANITIZED = ("float32", "bfloat16")
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", f"-I{HERE}"]
FLAVOURS = {
    "plain": ["-O1"],
    "address": [  # calls instead of inlined checks: a third of the time to compile
        *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "--param=asan-instrumentation-with-call-threshold=0",
    ],
    "undefined": ["-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
PARTS = {
    "driver": ("driver", "scan"),
    "step_driver": ("step_", "multi_state", "evict"),
}  # objects
DRIVERS = tuple(PARTS)
STRICT = {"EMULATION_STRICT_WARPS": "1"}
# Scans must do with fewer resident blocks than they launch; steps must be told the truth.
CLAIMED = {"driver": {"EMULATION_CLAIMED": "5"}, "step_driver": {}}
LIMIT_SECONDS = 300  # of one program: beyond, it hangs
JOBS = os.cpu_count() or 1


class Failure(Exception):
    """What a rung found, in words."""


# Building.


def compiler(*arguments: str | Path) -> None:
    command = [os.environ.get("CXX", "g++"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}\n{done.stderr}")


def is_current(target: Path, sources: Iterable[Path]) -> bool:
    if not target.exists():
        return False
    built = target.stat().st_mtime
    return all(source.stat().st_mtime < built for source in sources)


def compile_one(source: Path, target: Path, flags: list[str], csrc: Path) -> None:
    headers = [*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *HERE.glob("*.h")]
    if is_current(target, [source, *headers]):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler(*FLAGS, f"-I{csrc}", *flags, "-x", "c++", "-c", source, "-o", target)


def in_parallel(calls: Iterable[Callable[[], object]]) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def runtime() -> Path:
    """The scheduler, which no sanitizer may see."""
    target = BUILD / "runtime.o"
    compile_one(HERE / "runtime.cpp", target, ["-O2"], ROOT / "csrc")
    return target


def build_selftest() -> Path:
    folder = BUILD / "plain"
    compile_one(HERE / "selftest.cpp", folder / "selftest.o", ["-O1"], ROOT / "csrc")
    compiler(folder / "selftest.o", runtime(), "-o", folder / "selftest")
    return folder / "selftest"


def build_drivers(flavour: str) -> list[Path]:
    """That of the scans and that of multi-state attention."""
    folder, csrc = BUILD / flavour, ROOT / "csrc"
    jobs: dict[Path, Callable[[], object]] = {}

    def add(source: Path, flavour: str) -> None:
        target = BUILD / flavour / f"{source.name}.o"
        flags = FLAVOURS[flavour]
        if source.stem == "step_float16":  # as GPUs before sm_80 run it
            flags = [*flags, "-DEMULATED_WITHOUT_TENSOR_CORES"]
        jobs[target] = lambda: compile_one(source, target, flags, csrc)

    for dtype in DTYPES:  # a sanitizer makes a kernel slow to compile: two of them will do
        own = flavour if dtype in SANITIZED else "plain"
        add(csrc / f"cuda/instantiations/scan_{dtype}.cu", own)
        if dtype != "float64":
            add(csrc / f"cuda/instantiations/step_{dtype}.cu", own)
    add(csrc / "cuda/multi_state.cu", flavour)
    add(csrc / "cuda/evict.cu", flavour)
    add(csrc / "cuda/scan.cu", flavour)
    for name in DRIVERS:
        add(HERE / f"{name}.cpp", flavour)
    in_parallel([runtime, *jobs.values()])
    for name in DRIVERS:
        objects = [path for path in jobs if path.name.startswith(PARTS[name])]
        compiler(*FLAVOURS[flavour], *objects, runtime(), "-o", folder / name)
    return [folder / name for name in DRIVERS]


# Running.


@dataclass(frozen=True)
class Result:
    code: int | None  # None: it had to be stopped
    output: str

    def hashes(self) -> dict[str, str]:
        """Of each case that was run."""
        lines = [line.split() for line in self.output.splitlines()]
        return {line[2]: line[0] for line in lines if len(line) >= 3 and len(line[0]) == 16}


def run(program: Path, *arguments: str, limit: float = LIMIT_SECONDS, **settings: str) -> Result:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [str(program), *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return Result(None, "")
    return Result(done.returncode, done.stdout)


def schedule(shuffle: int, seed: int, resident: int) -> dict[str, str]:
    return {
        "EMULATION_SHUFFLE": str(shuffle),
        "EMULATION_SEED": str(seed),
        "EMULATION_RESIDENT": str(resident),
    }


def expect_success(result: Result) -> None:
    if result.code != 0:
        lines = result.output.splitlines()
        first = next((i for i, line in enumerate(lines) if "WRONG" in line or "===" in line), 0)
        raise Failure("\n".join([f"exit code {result.code}", *lines[first : first + 40]]))


# The rungs. Each returns what it has to say.


def selftest() -> str:
    program = build_selftest()
    for seed in "123":
        expect_success(run(program, EMULATION_SEED=seed, EMULATION_SHUFFLE="2"))
    seen_by_thread_sanitizer_alone = {"relaxed_flag", "relaxed_poll", "missing_syncwarp"}
    mistakes = set(run(program, "mistakes").output.split()) - seen_by_thread_sanitizer_alone
    for mistake in sorted(mistakes):
        if run(program, mistake, EMULATION_SPINS="100000").code == 0:
            raise Failure(f"{mistake}: not noticed")
    return f"{len(mistakes)} planted mistakes noticed"


def schedules() -> str:
    drivers = build_drivers("plain")
    tried = [schedule(0, 1, resident) for resident in (1, 4)]
    for shuffle in (1, 2):
        tried += [schedule(shuffle, 10 * shuffle + r, r) for r in (1, 4, 9)]
    cases = 0
    with ThreadPoolExecutor(JOBS) as pool:
        for driver, own in zip(drivers, (tried, tried[1::2]), strict=True):
            claimed = CLAIMED[driver.name]
            results = list(pool.map(lambda s, d=driver, c=claimed: run(d, **s, **c), own))
            cases += len(results[0].hashes())
            for settings, result in zip(own, results, strict=True):
                expect_success(result)
                for case, bits in result.hashes().items():
                    if results[0].hashes()[case] != bits:
                        raise Failure(f"{case}: other bits with {settings}")
    return f"{cases} cases, the same bits under {len(tried)} schedules (of steps, half of them)"


def run_drivers(flavour: str, *arguments: str, **settings: str) -> int:
    """How many cases were right."""
    cases = 0
    for driver in build_drivers(flavour):
        settings = CLAIMED[driver.name] | settings
        result = run(driver, *arguments, limit=LIMIT_SECONDS, **settings)
        expect_success(result)
        cases += len(result.hashes())
    return cases


def address() -> str:
    return f"{run_drivers('address', '--quick', EMULATION_SHUFFLE='2')} cases"


def undefined() -> str:
    return f"{run_drivers('undefined')} cases"


def thread() -> str:
    cases = run_drivers("thread", "--quick", EMULATION_SHUFFLE="2", **STRICT)
    return f"{cases} cases, no race"


# Mutations.


@dataclass
class Mutation:
    title: str
    settings: dict[str, str] = field(default_factory=dict)
    replaced: list[tuple[list[str], list[str]]] = field(default_factory=list)

    @property
    def driver(self) -> str:
        return "step_driver" if "step" in self.settings["file"] else "driver"

    @property
    def flavour(self) -> str:
        return self.settings["caught"] if self.settings["caught"] in FLAVOURS else "plain"


def read_mutation(path: Path) -> Mutation:
    lines = path.read_text().splitlines()
    mutation = Mutation(title=lines[0].removeprefix("# "))
    for line in lines[1:]:
        if line.startswith("-"):
            if not mutation.replaced or mutation.replaced[-1][1]:
                mutation.replaced.append(([], []))
            mutation.replaced[-1][0].append(line[1:].strip())
        elif line.startswith("+"):
            mutation.replaced[-1][1].append(line[1:].strip())
        elif line:
            key, _, value = line.partition(": ")
            mutation.settings[key] = value
    return mutation


def plant(mutation: Mutation, csrc: Path) -> None:
    """Edits a copy of the sources. Lines are compared without their indentation."""
    path = csrc.parent / mutation.settings["file"]
    lines = [line.strip() for line in path.read_text().splitlines()]
    for old, new in mutation.replaced:
        found = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
        if len(found) != 1:
            raise Failure(f"occurs {len(found)} times: {old}")
        lines[found[0] : found[0] + len(old)] = new
    path.write_text("\n".join(lines) + "\n")


def build_mutant(mutation: Mutation, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    plant(mutation, folder / "csrc")
    flags = FLAVOURS[mutation.flavour]
    driver = BUILD / mutation.flavour / f"{mutation.driver}_float32.o"
    if not mutation.settings["file"].endswith(".cuh"):  # the driver reads the other headers
        driver = folder / "driver.o"
        compile_driver_of_mutants(mutation.driver, driver, flags, folder / "csrc")
    kernel = folder / "kernel.o"
    source = "scan_float32" if mutation.driver == "driver" else "step_float32"
    compile_one(folder / f"csrc/cuda/instantiations/{source}.cu", kernel, flags, folder / "csrc")
    objects = [driver, kernel, BUILD / "runtime.o"]
    if mutation.driver == "step_driver":
        compile_one(folder / "csrc/cuda/evict.cu", folder / "evict.o", flags, folder / "csrc")
        objects.append(folder / "evict.o")
    compiler(*flags, *objects, "-o", folder / "driver")
    return folder / "driver"


def compile_driver_of_mutants(name: str, target: Path, flags: list[str], csrc: Path) -> None:
    compile_one(HERE / f"{name}.cpp", target, [*flags, "-DONLY_FLOAT32"], csrc)


def what_notices(mutation: Mutation, driver: Path) -> set[str]:
    """Under a few schedules, until it is noticed."""
    cases = mutation.settings["cases"].split()
    noticed, bits = set(), set()
    for seed, (shuffle, resident) in enumerate([(0, 4), (2, 2), (2, 4), (1, 9), (2, 1), (2, 5)]):
        settings = {**STRICT, "EMULATION_SPINS": "200000", **schedule(shuffle, seed, resident)}
        settings |= CLAIMED[mutation.driver]
        result = run(driver, *cases, limit=LIMIT_SECONDS, **settings)
        bits.add(str(result.hashes()))
        if "ThreadSanitizer: data race" in result.output:
            noticed.add("thread")
        elif "AddressSanitizer" in result.output:
            noticed.add("address")
        elif result.code in (None, 99):
            noticed.add("dead-lock")
        elif "WRONG" in result.output:
            noticed.add("values")
        elif result.code != 0:
            noticed.add(f"exit code {result.code}")
        elif len(bits) > 1:
            noticed.add("bits")
        if mutation.settings["caught"] in noticed:
            break
    return noticed


def check_mutation(path: Path) -> str:
    """What went wrong, or nothing."""
    mutation = read_mutation(path)
    started = time.monotonic()
    try:
        driver = build_mutant(mutation, BUILD / "mutations" / path.stem)
        noticed = what_notices(mutation, driver)
    except Failure as failure:
        return f"{path.name}: {failure}"
    took = time.monotonic() - started
    found = ", ".join(sorted(noticed)) or "nothing"
    print(f"  {took:4.0f} s  {found:18} {mutation.title}", flush=True)
    wanted = mutation.settings["caught"]
    return "" if wanted in noticed else f"{path.name}: wanted {wanted}, noticed {found}"


def mutations(chosen: str = "*") -> str:
    paths = sorted((ROOT / "tests/mutations").glob(f"{chosen}.txt"))
    planted = [read_mutation(path) for path in paths]
    drivers = sorted({(mutation.driver, mutation.flavour) for mutation in planted})

    def build(name: str, flavour: str) -> None:
        target = BUILD / flavour / f"{name}_float32.o"
        compile_driver_of_mutants(name, target, FLAVOURS[flavour], ROOT / "csrc")

    in_parallel([runtime])
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda which: build(*which), drivers))
        wrong = [text for text in pool.map(check_mutation, paths) if text]
    if wrong or not paths:
        raise Failure("\n".join(wrong) or "no such mutation")
    return f"{len(paths)} planted bugs noticed"


RUNGS: dict[str, Callable[[], str]] = {
    "selftest": selftest,
    "schedules": schedules,
    "address": address,
    "thread": thread,
    "mutations": mutations,
    "undefined": undefined,
}
DEFAULT = [rung for rung in RUNGS if rung != "undefined"]


def climb(name: str) -> bool:
    started = time.monotonic()
    rung, _, chosen = name.partition("=")
    try:
        said = mutations(chosen) if chosen else RUNGS[rung]()
        passed = True
    except Failure as failure:
        said, passed = f"FAILED\n{failure}", False
    print(f"{name:10} {time.monotonic() - started:5.0f} s  {said}", flush=True)
    return passed


def main(names: list[str]) -> int:
    unknown = [name for name in names if name.partition("=")[0] not in RUNGS]
    if unknown:
        print(f"no such rung: {' '.join(unknown)}")
        return 2
    return 0 if all([climb(name) for name in names or DEFAULT]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
