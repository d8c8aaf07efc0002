"""What Triton makes of its kernels, against the table in triton.json. No GPU is needed.

    python tests/budgets/triton.py [--check | --update] [--archs 80,90,100,120] [--quick]

Calls of the operators are recorded instead of launched, and what each would launch is compiled for
every architecture as Triton's own JIT would: the same specialisations, the same plan. Whatever the
version, a kernel must not spill or have a stack frame, and its data must be read at least 4 bytes
a lane. With a version of the table, its widest load must be as wide, and it must need at most a
tenth more registers, shared memory and instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose triton.py is not the package
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import msrnn_ops as ms
from bench.estimates.machine_code import tool
from bench.table import Table, show
from msrnn_ops.triton_kernels import multi_state, scan, scan_kernels, step_kernels

TABLE = Path(__file__).with_suffix(".json")
ARCHS = ("80", "90", "100", "120")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Budget:
    """What one kernel takes on one architecture."""

    registers: int
    shared: int  # of a program, bytes
    stack: int  # of a thread, bytes: spills
    wide_loads: int  # 4 bytes a lane and more
    wide_stores: int
    widest_load: int  # bytes a lane
    special: int
    instructions: int

    def faults(self) -> list[str]:
        """What no version may do."""
        return ["stack"] * (self.stack > 0) + ["wide_loads"] * (self.wide_loads == 0)

    def regressions(self, stored: Budget) -> list[str]:
        """What the version of the table may not do."""
        more = [n for n in ("registers", "shared") if getattr(self, n) > getattr(stored, n) * 1.1]
        narrower = ["widest_load"] * (self.widest_load < stored.widest_load)
        return more + narrower + ["instructions"] * (self.instructions > 1.1 * stored.instructions)


_FIELDS = [field.name for field in fields(Budget)]


@dataclass
class Launch:
    """A kernel and the arguments that it would have been launched with."""

    kernel: Any
    arguments: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        hints: dict[tuple[int, ...], list[list[Any]]] = {}

        def describe(path: tuple[int, ...], value: Any, specialised: bool) -> Any:
            if isinstance(value, tuple):
                parts = enumerate(value)
                return tuple(describe((*path, i), x, specialised) for i, x in parts)
            if isinstance(value, Tensor):
                hints[path] = [["tt.divisibility", 16]]
                return _TYPES[value.dtype]
            if isinstance(value, float):
                return "fp32"
            if isinstance(value, int) and not isinstance(value, bool):
                if specialised and value == 1:
                    constants[path] = 1
                    return "constexpr"
                if specialised and value % 16 == 0:
                    hints[path] = [["tt.divisibility", 16]]
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            constants[path] = value
            return "constexpr"

        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                constants[(i,)] = value
                signature[parameter.name] = "constexpr"
            else:
                special = not parameter.do_not_specialize
                signature[parameter.name] = describe((i,), value, special)
        options = {name: self.arguments[name] for name in _OPTIONS if name in self.arguments}
        return ASTSource(self.kernel, signature, constants, hints), options


class _Recorder:
    """In place of a kernel: remembers its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            self.launches.append(Launch(self.kernel, dict(zip(names, args, strict=False)) | kwargs))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    names = [
        (scan_kernels, n) for n in ("scan_forward", "scan_carries", "scan_backward", "scan_step")
    ]
    names += [(step_kernels, n) for n in ("attend", "finish", "evict")]
    kernels = [getattr(module, name) for module, name in names]
    for (module, name), kernel in zip(names, kernels, strict=True):
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for (module, name), kernel in zip(names, kernels, strict=True):
            setattr(module, name, kernel)


# One shape for each form of the plan: rows and channels fill a GPU, nearly do, do not.
_SHAPES = {"walk": (32, 2048, 2048), "segments": (4, 2048, 4096), "chunks": (1, 65536, 256)}
_INPUTS = {"linear_scan": 2, "log_scan": 2, "min_gru": 2, "min_lstm": 3}


def _call_scan(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backward: bool,
    packed: bool = False,
    reset: bool = False,
) -> None:
    """`packed`: eight sequences in reverse, with initial states. `reset`: with resets."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.empty(shape, dtype=dtype, device="meta")
    h0 = torch.empty(8, shape[2], dtype=wide, device="meta") if packed else None
    cu_seqlens = torch.empty(9, dtype=torch.int64, device="meta") if packed else None
    flags = (False,) if name.startswith("min_") else ()
    saved = 1 if name == "linear_scan" else _INPUTS[name]
    resets = torch.empty(shape[:2], dtype=torch.bool, device="meta") if reset else None
    options = (h0, cu_seqlens, resets, packed, *flags)
    if backward:
        scan.OPERATORS[f"{name}_backward"](x, h0, *[x] * saved, x, *options)
    else:
        scan.OPERATORS[name](*[x] * _INPUTS[name], *options)


def _call_step(
    heads: tuple[int, int], head_dim: int, policy: ms.Policy, dtype: torch.dtype, by_index: bool
) -> None:
    with torch.device("meta"):
        state = ms.MultiState(policy, batch=1, kv_heads=heads[1], head_dim=head_dim, dtype=dtype)
        q, k = (torch.empty(1, n, head_dim, dtype=dtype) for n in heads)
        rows = torch.empty(1, dtype=torch.int32) if by_index else None
    numbers = (*policy.numbers, head_dim**-0.5)
    multi_state.OPERATORS["attend_evict"](q, k, k, rows, *state.tensors(), *numbers)


def _call_scan_step(name: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        x, h = torch.empty(64, 4096, dtype=dtype), torch.empty(1024, 4096)
        rows = torch.empty(64, dtype=torch.int32)
    scan.OPERATORS[f"{name}_step"](*[x] * _INPUTS[name], h, rows, False)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    for label, dtype in dtypes.items():
        for name in _INPUTS:
            for form, shape in _SHAPES.items():
                for which in (
                    ("forward", "backward") if form != "chunks" or name == "min_gru" else ()
                ):
                    call = partial(_call_scan, name, shape, dtype, which == "backward")
                    yield f"{name}/{label}/{form}/{which}", call
        for name, form in (("min_gru", "chunks"), ("log_scan", "segments")):
            shape = (1, _SHAPES[form][1], 8192 if form == "segments" else 256)
            for which in ("forward", "backward"):
                call = partial(_call_scan, name, shape, dtype, which == "backward", True)
                yield f"{name}/{label}/{form}/packed {which}", call
        for heads, head_dim in (((32, 8), 128), ((32, 32), 64)):
            for policy in (
                ms.Policy.tova(8192),
                ms.Policy.h2o(8192, scope="head"),
                ms.Policy.tova(63),  # one split: no partial outputs
            ):
                size = f"{heads[0]}:{heads[1]}x{head_dim}x{policy.slots}"
                name = f"attend_evict/{label}/{size}/{policy.score}"
                yield name, partial(_call_step, heads, head_dim, policy, dtype, False)
        one = partial(_call_step, (32, 8), 128, ms.Policy.tova(8192), dtype, True)
        yield f"attend_evict/{label}/32:8x128x8192/rows", one
        for name in ("min_gru", "min_lstm"):
            yield f"{name}_step/{label}/rows", partial(_call_scan_step, name, dtype)
    for label, dtype in dtypes.items():
        for form, shape in _SHAPES.items():
            for which in ("forward", "backward"):
                call = partial(_call_scan, "min_gru", shape, dtype, which == "backward", reset=True)
                yield f"min_gru/{label}/{form}/resets {which}", call


def measure(launch: Launch, arch: str) -> Budget:
    source, options = launch.source()
    target = GPUTarget("cuda", int(arch), 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tool("cuobjdump"), "-res-usage", cubin.name])
        code = run([tool("nvdisasm"), "-c", cubin.name]).stdout
    used = {k: int(n) for k, n in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code)
    loads = [n for n in names if n.startswith(("LDG", "LDGSTS"))]
    stores = [n for n in names if n.startswith("STG")]

    def width(name: str) -> int:
        if ".128" in name:
            return 16
        return 8 if ".64" in name else 2 if ".U16" in name else 1 if ".U8" in name else 4

    widths = [width(n) for n in loads]
    return Budget(
        used["REG"],
        compiled.metadata.shared,
        used["STACK"],
        sum(w >= 4 for w in widths),
        sum(width(n) >= 4 for n in stores),
        max(widths, default=0),
        sum(n.startswith("MUFU") for n in names),
        len(names),
    )


def measure_all(archs: Sequence[str], quick: bool) -> dict[str, Budget]:
    jobs: dict[str, tuple[Launch, str]] = {}
    for name, call in cases():
        if quick and "bfloat16" not in name:
            continue
        with recorded() as launches:
            call()
        for i, launch in enumerate(launches):
            kernel = f"{name}/{i}.{launch.kernel.__name__}"
            chosen = [archs[len(jobs) % len(archs)]] if quick else archs
            jobs |= {f"{kernel}/sm_{arch}": (launch, arch) for arch in chosen}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: measure(*job), jobs.values()), strict=True))


def load() -> dict[str, dict[str, Budget]]:
    """The stored tables by the version of Triton."""
    if not TABLE.exists():
        return {}
    stored = json.loads(TABLE.read_text())["versions"]
    return {v: {k: Budget(*row) for k, row in rows.items()} for v, rows in stored.items()}


def save(versions: dict[str, dict[str, Budget]]) -> None:
    """One line for each kernel and architecture."""
    tables = []
    for version, usage in sorted(versions.items()):
        rows = ",\n".join(f'   "{key}": {list(astuple(b))}' for key, b in usage.items())
        tables.append(f'  "{version}": {{\n{rows}\n  }}')
    names, text = json.dumps(_FIELDS), ",\n".join(tables)
    TABLE.write_text(f'{{\n "fields": {names},\n "versions": {{\n{text}\n }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail where a kernel got worse")
    action.add_argument("--update", action="store_true", help="store what was measured")
    parser.add_argument("--archs", default=",".join(ARCHS), help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="bfloat16, each kernel for one architecture in turn"
    )
    options = parser.parse_args()
    usage = measure_all(options.archs.split(","), options.quick)
    stored, version = load(), triton.__version__
    print(f"Triton {version}, {len(usage)} kernels")
    if options.update:
        save({**stored, version: usage})
    elif options.check:
        failed = []
        for key, budget in usage.items():
            bad = budget.faults()
            if version in stored:
                before = stored[version].get(key)
                bad += budget.regressions(before) if before else ["not in the table"]
            failed += [[key, fault, str(astuple(budget))] for fault in bad]
        if failed:
            show(Table("Worse than the table", "", ["kernel", "", ", ".join(_FIELDS)], failed))
        return bool(failed)
    else:
        rows = [[key, *map(str, astuple(b))] for key, b in usage.items()]
        show(Table("Kernels", "", ["kernel", *_FIELDS], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
