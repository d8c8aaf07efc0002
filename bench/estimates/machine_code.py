"""The machine code of the CUDA kernels: their names in it, and the tools that show it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Code = dict[str, list[str]]  # lines of machine code by the name of a kernel


@dataclass(frozen=True)
class Op:
    """An op: its name in C++ and mangled, the tensors of B*T*D that each pass reads and writes."""

    kind: str
    mangled: str
    tensors: dict[str, tuple[int, int]]


def _op(kind: str, mangled: str, forward: tuple[int, int], backward: tuple[int, int]) -> Op:
    return Op(kind, mangled, {"forward": forward, "backward": backward})


OPS = {
    "linear_scan": _op("LinearScan", "10LinearScanE", (2, 1), (3, 2)),
    "decay_scan": _op("DecayScan", "9DecayScanE", (2, 1), (3, 2)),
    "log_scan": _op("LogScan", "7LogScanE", (2, 1), (4, 2)),
    "min_gru": _op("MinGru<false>", "6MinGruILb0EEE", (2, 1), (4, 2)),
    "min_gru_identity": _op("MinGru<true>", "6MinGruILb1EEE", (2, 1), (4, 2)),
    "min_lstm": _op("MinLstm<false>", "7MinLstmILb0EEE", (3, 1), (5, 3)),
    "min_lstm_identity": _op("MinLstm<true>", "7MinLstmILb1EEE", (3, 1), (5, 3)),
}


@dataclass(frozen=True)
class DType:
    """A dtype: its name in C++ and mangled, and its bytes."""

    kind: str
    mangled: str
    size: int


DTYPES = {
    "float32": DType("float", "f", 4),
    "float64": DType("double", "d", 8),
    "bfloat16": DType("BFloat16", "NS_8BFloat16E", 2),
    "float16": DType("Half", "NS_4HalfE", 2),
}
PASSES = {"forward": "0", "backward": "1"}
KERNELS = {  # by what a mangled name holds
    f"{op.mangled}{dtype.mangled}Lb{bit}E": f"{name}/{dtype_name}/{which}"
    for (name, op), (dtype_name, dtype), (which, bit) in product(
        OPS.items(), DTYPES.items(), PASSES.items()
    )
}
# A step has two forms: a lane holds one piece of a row, or two (head_dim above 128 in float32).
KERNELS |= {
    f"{DTYPES[name].mangled}Li{pieces}E": f"attend_evict/{name}/{pieces}"
    for name, pieces in (("float32", 1), ("float32", 2), ("bfloat16", 1), ("float16", 1))
}
# In place on rows of a larger state.
KERNELS |= {
    f"{op.mangled}{dtype.mangled}": f"{name}_step/{dtype_name}/1"
    for (name, op), (dtype_name, dtype) in product(OPS.items(), DTYPES.items())
    if name.startswith("min_")
}
KERNELS["evict_kernel"] = "evict/float32/1"  # its scores are float32, whatever the state holds


def tool(name: str) -> str:
    """A CUDA program: on PATH, beside nvcc, or in the Python packages that bring it."""
    if found := shutil.which(name):
        return found
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    places = [Path(nvcc).resolve().parent]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        places += [Path(p, folder) for p in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        if found := shutil.which(name, path=str(place)):
            return found
    sys.exit(f"{name} was not found; pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump")


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints, both ways; its errors end this program."""
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr}")
    return run.stdout + run.stderr


def kernel_name(mangled: str) -> str | None:
    """Such as min_gru/bfloat16/forward; none for what is no kernel of ours."""
    pattern = (
        r"row_step_kernelINS_(\S+?)EEvNS|(?:scan_kernelINS_|step_kernelI)(\S+?L[bi]\dE)EEvNS"
        r"|(evict_kernel)ENS"
    )
    found = re.search(pattern, mangled)
    return KERNELS.get(found[1] or found[2] or found[3]) if found else None


def disassemble(cubin: Path) -> Code:
    """Machine code of the kernels by name."""
    return code_of(output_of(tool("nvdisasm"), "-c", str(cubin)))


def code_of(text: str) -> Code:
    """What nvdisasm printed, by kernel: instructions, and labels with a colon."""
    code = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        lines = re.findall(r"^(\.L_x_\d+:|\$\S+:)|/\*[0-9a-f]{4,}\*/\s+([^;]*?) *;", section, re.M)
        if name := kernel_name(section[: section.index(",")]):
            code[name] = [label or line for label, line in lines]
    return code


def opcode(line: str) -> str:
    """The instruction's name with its suffixes, without a predicate."""
    return re.sub(r"^@!?U?P\w+ +", "", line).split()[0]
