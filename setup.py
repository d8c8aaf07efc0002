"""Builds msrnn_ops: one host-only pybind11 module, the CPU operators and the CUDA operators.

The operators use LibTorch's stable ABI at target 2.11, so one build runs on torch 2.11 and later.

The CUDA operators are built where torch has CUDA and nvcc is found; FORCE_CUDA=1 builds them with
any torch and fails without nvcc, MSRNN_SKIP_CUDA=1 leaves them out. TORCH_CUDA_ARCH_LIST names the
GPUs ("8.0;9.0+PTX" or "Ampere"); by default every one from 7.5 to 12.0 that nvcc knows. No GPU is
needed. MSRNN_SKIP_OPERATORS=1 compiles only the module, which depends on the version of Python, for
operators that were built elsewhere. What is missing or wrong ends the build with one line.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent


def stop(message: str) -> NoReturn:
    sys.exit(f"msrnn_ops: {message}")


def check_requirements() -> None:
    """Stops where a package that pyproject.toml asks for is missing or too old.

    This comes before the imports, and before an old setuptools reads a pyproject.toml that it does
    not understand.
    """
    requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    wrong, wanted = [], re.findall(r'"(\w+)>=([\d.]+)"', requires)
    for name, least in wanted:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if release(found) < release(least):
            wrong.append(f"{name} {found} is too old")
    if wrong:
        packages = " ".join(f"'{name}>={least}'" for name, least in wanted)
        stop(f"{', '.join(wrong)}; run: pip install {packages}")


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


check_requirements()

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "msrnn_ops/version.py").read_text(), re.M)[1]
TORCH_TARGET = "2.11"
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CPU_SOURCES = [
    *("scan", "multi_state", "multi_state_prompt", "multi_state_backward"),
    *(f"instantiations/scan_{isa}" for isa in ("baseline", "avx2", "avx512")),
    *(f"instantiations/multi_state_{isa}" for isa in ("baseline", "avx2", "avx512", "avx512_bf16")),
]
STABLE_ABI = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),
    ("Py_LIMITED_API", "0x030A0000"),
]
SCANS = [f"instantiations/scan_{dtype}" for dtype in ("float32", "float64", "bfloat16", "float16")]
STEPS = [f"instantiations/step_{dtype}" for dtype in ("float32", "bfloat16", "float16")]
KERNELS = [
    *SCANS,
    *STEPS,
    "row_step",
    "multi_state",
    "evict",
    "scan",
]  # the longest to compile first
SANITIZE = os.environ.get("MSRNN_SANITIZE")  # e.g. address,undefined


# What torch means by these names.
NAMED_ARCHS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Ampere+Tegra": "8.7",
    "Blackwell+Tegra": "11.0",
}


def flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    stop(f"expected {name} to be 1 or 0, got {value!r}")


def max_jobs() -> int:
    """How many compilers may run at once."""
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return os.cpu_count() or 1
    if not value.isdecimal() or int(value) < 1:
        stop(f"expected MAX_JOBS to be a number from 1 on, got {value!r}")
    return int(value)


def wants_cuda() -> bool:
    if flag("MSRNN_SKIP_CUDA"):
        return False
    forced = flag("FORCE_CUDA")
    if forced and nvcc() is None:
        stop("FORCE_CUDA=1 but nvcc was not found; set CUDA_HOME or PATH")
    wanted = forced or (torch.version.cuda is not None and nvcc() is not None)
    if wanted and release(cuda_version()) < (12, 0):
        stop(
            f"expected nvcc 12.0 or newer, got {cuda_version()} at {nvcc()}; set CUDA_HOME to a "
            "newer one, or MSRNN_SKIP_CUDA=1 to build without CUDA"
        )
    return wanted


def nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def ask_nvcc(pattern: str, *arguments: str) -> list[str]:
    """What in nvcc's answer matches the pattern."""
    command = [nvcc(), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        stop(f"cannot run {command[0]} ({error.strerror}); set CUDA_HOME or MSRNN_SKIP_CUDA=1")
    found = re.findall(pattern, run.stdout + run.stderr)
    if run.returncode or not found:
        last = (run.stderr or run.stdout).strip().rpartition("\n")[2]
        stop(
            f"expected {' '.join(command)} to answer as nvcc does, got {last!r}; set CUDA_HOME or "
            "MSRNN_SKIP_CUDA=1"
        )
    return found


def cuda_version() -> str:
    return ask_nvcc(r"release (\d+\.\d+)", "--version")[0]


def cuda_archs() -> list[str]:
    """Compute capabilities as "90", those that also keep PTX as "90+PTX"."""
    known = ask_nvcc(r"compute_(\d+)", "--list-gpu-arch")
    wanted = re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if wanted != [""]:
        return parse_archs(wanted, known)
    archs = [name for name in ("75", "80", "86", "89", "90", "100", "120") if name in known]
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def parse_archs(wanted: list[str], known: list[str]) -> list[str]:
    """Of names such as 9.0, 90, 9.0a, 8.0+PTX and Hopper; known has those of nvcc, such as 90."""
    archs = []
    for name in wanted:
        for arch in NAMED_ARCHS.get(name, name).split(";"):
            found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", arch)
            if found is None or found[1] + found[2] not in known:
                numbers = ", ".join(f"{x[:-1]}.{x[-1]}" for x in sorted(known, key=int))
                stop(
                    f"expected TORCH_CUDA_ARCH_LIST to name GPUs that nvcc {cuda_version()} knows "
                    f"({numbers}; {', '.join(NAMED_ARCHS)}), got {name!r}"
                )
            archs.append(arch.replace(".", ""))
    return archs


class Build(BuildExtension):
    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            stop(f"no C++ compiler ({compiler!r} not found); install g++ or set CXX")
        for extension in self.extensions:
            if extension.name == "msrnn_ops._cuda":
                extension.extra_objects = self.compile_kernels()
        super().build_extensions()

    def compile_kernels(self) -> list[str]:
        """The kernels know no torch, so nvcc reads them alone, in parallel."""
        folder = Path(self.build_temp, "cuda").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"]
        newest = max(path.stat().st_mtime for path in sources)
        stamp = folder / "archs"
        if not stamp.exists() or stamp.read_text() != str(cuda_archs()):
            newest = float("inf")
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(partial(compile_kernel, folder, newest), KERNELS))
        stamp.write_text(str(cuda_archs()))
        return objects


def compile_kernel(folder: Path, newest: float, name: str) -> str:
    target = folder / f"{Path(name).name}.o"
    if target.exists() and target.stat().st_mtime > newest:
        return str(target)
    codes = []
    for arch in cuda_archs():
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        codes.append(f"-gencode=arch=compute_{number},code={code}")
    command = [nvcc(), "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]
    threads = max(1, JOBS // len(KERNELS))
    command += ["--threads", str(threads), "-c", f"csrc/cuda/{name}.cu", "-o", str(target)]
    print(" ".join(command), flush=True)
    if code := subprocess.run(command, cwd=ROOT).returncode:
        stop(f"nvcc failed with code {code} on csrc/cuda/{name}.cu; what it said is above")
    return str(target)


def operators() -> list[Extension]:
    cpu = CppExtension(
        "msrnn_ops._cpu",
        ["csrc/ops.cpp", *(f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES)],
        define_macros=STABLE_ABI,
        extra_compile_args=FLAGS + sanitize,
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return [cpu, *([cuda_extension()] if cuda else [])]


def cuda_extension() -> Extension:
    # Where nvcc itself would look for the runtime, which is linked in: no version to agree on.
    dry_run = "-dryrun", "-x", "cu", "/dev/null", "-o", "/dev/null"
    libraries = re.findall(r'-L([^"\s]+)', ask_nvcc("LIBRARIES=(.*)", *dry_run)[0])
    return CppExtension(
        "msrnn_ops._cuda",
        ["csrc/cuda/scan.cpp", "csrc/cuda/multi_state.cpp"],
        define_macros=[
            *STABLE_ABI,
            ("USE_CUDA", None),
            *([] if torch.version.cuda else [("MSRNN_TORCH_WITHOUT_CUDA", None)]),
        ],
        extra_compile_args=FLAGS,
        library_dirs=libraries,
        libraries=[
            *(["torch_cuda"] if torch.version.cuda else []),
            *("cudart_static", "dl", "rt", "pthread"),
        ],
        py_limited_api=True,
    )


# Checks by call and none of the stack: with both inline the kernels take minutes to compile.
sanitize = [
    f"-fsanitize={SANITIZE}",
    "-fno-sanitize=null,alignment,vptr,object-size",
    "-fno-sanitize-recover=undefined",
    *("--param", "asan-stack=0", "--param", "asan-instrumentation-with-call-threshold=0"),
    "-O1",
]
sanitize = sanitize if SANITIZE else []
JOBS = max_jobs()
cuda = wants_cuda()
setup(
    version=VERSION,
    ext_modules=[
        Pybind11Extension(
            "msrnn_ops._C",
            ["csrc/module.cpp"],
            define_macros=[
                ("MSRNN_VERSION", f'"{VERSION}"'),
                ("MSRNN_TORCH_TARGET", f'"{TORCH_TARGET}"'),
                ("MSRNN_CUDA", f'"{cuda_version() if cuda else ""}"'),
                ("MSRNN_CUDA_ARCHS", f'"{" ".join(cuda_archs()) if cuda else ""}"'),
            ],
            extra_compile_args=FLAGS,
        ),
        *([] if flag("MSRNN_SKIP_OPERATORS") else operators()),
    ],
    cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)},
)
