"""What setup.py says, in one line, where something is missing, too old or misspelt."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

SETUP = Path(__file__).parents[1] / "setup.py"
VARIABLES = ("FORCE_CUDA", "MSRNN_SKIP_CUDA", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
KNOWN = ["75", "80", "86", "87", "90", "120"]


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, which builds nothing here."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(SETUP))


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake_nvcc(release) puts a compiler of that release where CUDA_HOME points."""

    def place(release: str) -> None:
        script = tmp_path / "bin/nvcc"
        script.parent.mkdir(exist_ok=True)
        archs = " ".join(f"compute_{arch}" for arch in KNOWN)
        script.write_text(
            f'#!/bin/sh\ncase "$1" in\n--version) echo "Cuda tools, release {release}, V1" ;;\n'
            f"--list-gpu-arch) echo {archs} ;;\nesac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return place


def message(function: Callable[..., object], *args: object) -> str:
    """The only line with which a function ends the build."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    text = str(stopped.value)
    assert text.startswith("msrnn_ops: ") and "\n" not in text
    return text


def test_packages(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check, installed = functions["check_requirements"], metadata.version
    check()  # of this environment nothing is missing

    def version(name: str) -> str:
        if name == "pybind11":
            raise metadata.PackageNotFoundError(name)
        return {"setuptools": "65.5.0", "torch": "2.9.1+cu128"}.get(name) or installed(name)

    monkeypatch.setattr(metadata, "version", version)
    text = message(check)
    assert "setuptools 65.5.0 is too old, pybind11 is missing, torch 2.9.1+cu128 is too old" in text
    assert text.endswith("pip install 'setuptools>=77' 'pybind11>=2.12' 'torch>=2.11'")


def test_a_package_is_missed_before_it_is_imported() -> None:
    """In a Python without any package, through the process that pip would start."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", str(SETUP), "--version"], capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "setuptools is missing, pybind11 is missing, torch is missing" in run.stderr


@pytest.mark.parametrize("word", ["1", "true", "YES", " on "])
def test_words_that_switch_on(
    functions: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_CUDA", word)
    assert functions["flag"]("FORCE_CUDA")


@pytest.mark.parametrize("word", ["", "0", "false", "No", "off"])
def test_words_that_switch_off(
    functions: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_CUDA", word)
    assert not functions["flag"]("FORCE_CUDA")


def test_another_word(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_CUDA", "12.4")
    assert "expected FORCE_CUDA to be 1 or 0, got '12.4'" in message(functions["wants_cuda"])


def test_number_of_compilers(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = functions["max_jobs"]
    assert jobs() == os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "")
    assert jobs() == os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert jobs() == 3
    for wrong in ("all", "abc", "0", "-2", "1.5"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        assert f"expected MAX_JOBS to be a number from 1 on, got '{wrong}'" in message(jobs)


def test_when_cuda_is_built(
    functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fake_nvcc: Callable[[str], None]
) -> None:
    wants, nothing = functions["wants_cuda"], str(SETUP.parent / "tests")
    monkeypatch.setitem(wants.__globals__, "nvcc", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not wants()
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert "nvcc was not found; set CUDA_HOME" in message(wants)
    monkeypatch.setitem(wants.__globals__, "nvcc", functions["nvcc"])

    monkeypatch.setenv("PATH", nothing)
    fake_nvcc("12.0")
    assert wants()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert wants()
    monkeypatch.setenv("MSRNN_SKIP_CUDA", "yes")
    assert not wants()
    monkeypatch.delenv("MSRNN_SKIP_CUDA")
    monkeypatch.setenv("FORCE_CUDA", "off")
    assert not wants()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert wants()

    fake_nvcc("11.8")
    text = message(wants)
    assert "expected nvcc 12.0 or newer, got 11.8 at " in text and "MSRNN_SKIP_CUDA=1" in text


@pytest.mark.parametrize(
    ("names", "archs"),
    [
        ("", ["75", "80", "86", "90", "120+PTX"]),
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("8.0 9.0a, 120", ["80", "90a", "120"]),
        ("Turing;Ampere", ["75+PTX", "80", "86+PTX"]),
        ("Hopper;", ["90+PTX"]),
        ("8.0+PTX", ["80+PTX"]),
        ("Ampere+Tegra Hopper", ["87", "90+PTX"]),
    ],
)
def test_names_of_gpus(
    functions: dict[str, Any],
    fake_nvcc: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    archs: list[str],
) -> None:
    fake_nvcc("13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    assert functions["cuda_archs"]() == archs


@pytest.mark.parametrize(
    "wrong", ["9.9", "Volta", "hopper", "9.0+ptx", "native", "Ada", "sm_90", "all", "Kepler+Tesla"]
)
def test_unknown_names_of_gpus(
    fake_nvcc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    fake_nvcc("13.0")
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{wrong}")
    text = message(runpy.run_path, str(SETUP))
    assert (
        "that nvcc 13.0 knows (7.5, 8.0, 8.6, 8.7, 9.0, 12.0; Turing, Ampere, Ada, Hopper" in text
    )
    assert text.endswith(f"got '{wrong}'")


def place_script(folder: Path, script: str) -> None:
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(script)
    nvcc.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\necho cudafe++ is missing >&2; exit 1\n", "got 'cudafe++ is missing'"),
        ("#!/bin/sh\necho a wrapper of nvcc\n", "got 'a wrapper of nvcc'"),
        ("#!/no/such/interpreter\n", "cannot run"),
        ("not a program", "cannot run"),
    ],
    ids=["fails", "says something else", "no interpreter", "no program"],
)
def test_an_nvcc_that_does_not_answer(
    functions: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    words: str,
) -> None:
    place_script(tmp_path, script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FORCE_CUDA", "1")
    for function in ("wants_cuda", "cuda_archs", "cuda_extension"):
        text = message(functions[function])
        assert words in text and "set CUDA_HOME or MSRNN_SKIP_CUDA=1" in text


def test_a_kernel_that_nvcc_does_not_compile(
    functions: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_script(tmp_path, "#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_90 || exit 2\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    text = message(functions["compile_kernel"], tmp_path, float("inf"), "evict")
    assert text.endswith("nvcc failed with code 2 on csrc/cuda/evict.cu; what it said is above")
