"""The house itself: imports go down, modules stand alone, what is private stays in its file."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import inspect
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import msrnn_ops as ms
from msrnn_ops import distributed

PACKAGE = Path(ms.__file__).parent
ROOT = PACKAGE.parent
BENCH, CSRC = ROOT / "bench", ROOT / "csrc"

# From top to bottom: a module imports from floors below its own. (Triton's kernels are imported by
# name, by their first call.)
FLOORS = [
    {"transformers", "vllm.backend", "vllm.scheduler"},
    {"vllm"},
    {"vllm.batch"},
    {"distributed"},
    {"distributed.nn", "distributed.multi_state"},
    {"distributed.scan", "nn"},
    {"scan", "multi_state", "onnx"},
    {"checks"},
    {"operators.sharding", "operators.complex_scan", "operators.layer"},
    {"operators.scan", "operators.multi_state"},
    {"operators.prompt", "operators.in_place", "operators"},
    {"reference"},
    {"state"},
    {"backend", "dtensor", "exchange"},
    {"errors", "convolution", "transforms", "version", "_C"},
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}

# Imports that wait for a call, since DTensor's module takes long to import.
AT_FIRST_USE = {("checks", "operators.sharding"), ("distributed", "operators.sharding")}


def name_of(path: Path, folder: Path) -> str:
    parts = list(path.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(folder: Path, leave_out: str = "") -> dict[str, ast.Module]:
    paths = (x for x in folder.rglob("*.py") if not leave_out or leave_out not in x.parts)
    return {name_of(x, folder): ast.parse(x.read_text("utf-8")) for x in paths}


def imports(tree: ast.AST, module: str, package: str, names: set[str]) -> Iterator[str]:
    """Modules of the package that a tree imports, wherever in it: "" is the package's root."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.name.removeprefix(package).lstrip(".")
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([package, *module.split(".")[: -node.level], source]).strip(".")
            if source.split(".")[0] != package:
                continue
            source = source.removeprefix(package).lstrip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}".lstrip(".")
                yield whole if whole in names else source


def graph(folder: Path, leave_out: str = "") -> dict[str, set[str]]:
    found = modules(folder, leave_out)
    names = {*found, "_C"}
    return {
        name: set(imports(tree, name, folder.name, names)) - {name} for name, tree in found.items()
    }


def test_imports_go_down() -> None:
    arrows = graph(PACKAGE, "triton_kernels")
    assert set(arrows) - {""} == set(FLOOR) - {"_C"}
    for importer, imported in arrows.items():
        for name in imported:
            assert importer == "" or FLOOR[importer] < FLOOR[name], f"{importer} imports {name}"


@pytest.mark.parametrize("folder", [PACKAGE / "triton_kernels", BENCH], ids=lambda x: x.name)
def test_there_is_no_circle_of_imports(folder: Path) -> None:
    if not folder.exists():
        pytest.skip("needs the source tree")
    assert list(graphlib.TopologicalSorter(graph(folder)).static_order())


def test_only_dtensors_are_imported_within_a_function() -> None:
    found = set()
    trees = modules(PACKAGE, "triton_kernels")
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                found |= {(name, x) for x in imports(node, name, "msrnn_ops", set(trees))}
    assert found == AT_FIRST_USE


@pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree")
def test_includes_go_down() -> None:
    """Headers of csrc/ know neither cpu/ nor cuda/, which do not know each other."""
    arrows: dict[str, set[str]] = {}
    for path in [*CSRC.glob("*.*"), *CSRC.glob("*/*.*"), *CSRC.glob("*/*/*.*")]:
        if path.suffix == ".md":
            continue
        named = re.findall(r'#include "(.*?)"', path.read_text("utf-8"))
        places = {(path.parent / x).resolve() for x in named if (path.parent / x).exists()}
        arrows[str(path)] = {str(x) for x in places if x != path and CSRC in x.parents}
    assert sum(map(len, arrows.values())) > 50
    list(graphlib.TopologicalSorter(arrows).static_order())
    for path, included in arrows.items():
        mine = Path(path).relative_to(CSRC).parts[:-1]
        if path == str(CSRC / "module.cpp"):  # the top: it shows Python some of both
            continue
        for other in included:
            theirs = Path(other).relative_to(CSRC).parts[:-1]
            assert theirs == mine[: len(theirs)] or theirs[:1] == mine[:1], f"{path}: {other}"


def private_definitions(tree: ast.Module) -> set[str]:
    """Names with an underscore that a file defines, attributes included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {x for x in found if x.startswith("_") and not x.startswith("__") and x != "_"}


@pytest.mark.parametrize("folder", [PACKAGE, BENCH], ids=lambda x: x.name)
def test_no_private_name_crosses_a_file(folder: Path) -> None:
    if not folder.exists():
        pytest.skip("needs the source tree")
    trees = modules(folder)
    own = {name: private_definitions(tree) for name, tree in trees.items()}
    everywhere = set().union(*own.values())
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                ours = node.level or (node.module or "").split(".")[0] in ("msrnn_ops", "bench")
                taken = {x.name for x in node.names if x.name.startswith("_")}
                taken -= {"_C", "__version__"}
                assert not (ours and taken), f"{name} imports {taken}"
            if isinstance(node, ast.Attribute):
                theirs = node.attr in everywhere - own[name]
                assert not theirs, f"{name}:{node.lineno} uses {ast.unparse(node)}"


ALONE = """
import importlib, os, sys, types, torch

def load(*names):
    child = os.fork()
    if child == 0:
        try:
            package = types.ModuleType("msrnn_ops")
            package.__path__ = [sys.argv[1]]
            sys.modules["msrnn_ops"] = package
            for name in names:
                importlib.import_module(name)
        except BaseException as error:
            print(names, type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)

for name in sys.argv[2:]:
    load(name)
load(*sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_alone_and_in_any_order() -> None:
    """Without the package's own __init__, which would import the others first."""
    names = [f"msrnn_ops.{name}" for name in FLOOR if name != "_C"]
    for package in ("transformers", "vllm"):
        if importlib.util.find_spec(package) is None:
            names = [x for x in names if not x.startswith(f"msrnn_ops.{package}")]
    random.shuffle(names)
    command = [sys.executable, "-c", ALONE, str(PACKAGE), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def public_functions() -> dict[str, object]:
    found: dict[str, object] = {}
    for module in (ms, distributed, ms.nn):
        for name in module.__all__:
            x = getattr(module, name)
            if inspect.isclass(x):
                methods = {k: v for k, v in vars(x).items() if not k.startswith("_")}
                found |= {f"{name}.{k}": v for k, v in methods.items() if inspect.isfunction(v)}
            elif inspect.isfunction(x):
                found[f"{module.__name__}.{name}"] = x
    return found


@pytest.mark.parametrize("name", public_functions())
def test_no_public_function_returns_any(name: str) -> None:
    function = public_functions()[name]
    returned = str(inspect.signature(function).return_annotation)
    assert returned and "Any" not in returned and "_empty" not in returned
