"""``make gpu-prepare``: makes all that check.py needs of a GPU's machine and that needs no GPU.

The time on such a machine is short, and it may have no network. So this puts into one folder the
operators' libraries for one architecture, built against the oldest torch that is supported; the
probe; and the peers of the benchmark. check.py takes the libraries and the probe if they were built
from the sources at hand, and compiles what is missing. Only the small module _C depends on the
version of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "build/gpu"
MANIFEST = BUNDLE / "bundle.json"
LIBRARIES, PROBE, PEERS = BUNDLE / "lib", BUNDLE / "probe", BUNDLE / "peers"
_ENVIRONMENT = ROOT / "build/gpu-environment"
_TORCH = "torch==2.11.0"
_PACKAGES = ("numpy", "setuptools>=77", "pybind11", "ninja")
_TESTS = ("pytest", "hypothesis", "rich", "matplotlib")  # to rehearse with
# The peers, what they import, and what the benchmark does: all pure Python.
_PEERS = ("fla-core", "accelerated-scan", "einops", "click")
_MOST = 64 << 20  # bytes that may travel to a borrowed machine


def sources() -> str:
    """A digest of all that libraries and probe are built from."""
    files = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"]
    files += [ROOT / "setup.py", ROOT / "msrnn_ops/version.py", probe_source()]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def probe_source() -> Path:
    return ROOT / "tests/gpu/probe.cu"


def probe_command(nvcc: str, capability: str, target: Path) -> list[str]:
    number = capability.replace(".", "")
    code = f"-gencode=arch=compute_{number},code=sm_{number}"
    return [nvcc, "-std=c++20", "-O3", code, str(probe_source()), "-o", str(target)]


def _run(*command: str | Path, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def _pip(python: Path, *words: str) -> None:
    _run(python, "-m", "pip", "install", "-q", "--no-cache-dir", *words)


def _environment(folder: Path) -> None:
    if not (folder / "bin/python").exists():
        _run(sys.executable, "-m", "venv", folder)
    _pip(folder / "bin/python", _TORCH, *_PACKAGES, *_TESTS)


def _libraries(python: Path, capability: str) -> None:
    shutil.rmtree(LIBRARIES, ignore_errors=True)
    folders = ["--build-lib", str(LIBRARIES), "--build-temp", str(ROOT / "build/gpu-objects")]
    build = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    _run(python, "setup.py", "build_ext", *folders, **build)
    (LIBRARIES / "msrnn_ops/_C.so").unlink()  # of this Python's version


def _peers(python: Path) -> None:
    shutil.rmtree(PEERS, ignore_errors=True)
    _pip(python, "--no-deps", "--no-compile", "--target", str(PEERS), *_PEERS)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--capability", default="9.0", help="of the GPU (%(default)s)")
    add("--environment", type=Path, default=_ENVIRONMENT, help="folder; a few GB (%(default)s)")
    arguments = parser.parse_args()
    if (nvcc := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")) is None:
        print("make gpu-prepare: nvcc not found; set PATH", file=sys.stderr)
        return 1
    environment: Path = arguments.environment.absolute()
    python, capability = environment / "bin/python", arguments.capability
    BUNDLE.mkdir(parents=True, exist_ok=True)
    MANIFEST.unlink(missing_ok=True)
    steps: Mapping[str, Callable[[], None]] = {
        "environment": lambda: _environment(environment),
        "libraries": lambda: _libraries(python, capability),
        "probe": lambda: _run(*probe_command(nvcc, capability, PROBE)),
        "peers": lambda: _peers(python),
    }
    seconds = {}
    for name, step in steps.items():
        start = time.monotonic()
        step()
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    manifest = {"sources": sources(), "capability": capability, "seconds": seconds}
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    size = _size(BUNDLE)
    print(f"{BUNDLE.relative_to(ROOT)}: {size / 2**20:.1f} MiB")
    if size > _MOST:
        print(f"make gpu-prepare: more than {_MOST >> 20} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
