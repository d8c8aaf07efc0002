"""``python -m bench.papers``: the experiments of both papers, and one page of what was found.

Every part leaves its results in a file; the page shows those of all parts that are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from bench import machine
from bench.measure import reuse_freed_memory
from bench.papers import report
from bench.papers.part import Options, Store

PARTS = ("cost", "copying", "characters", "control", "states")


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (all)")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="minutes on two cores (the default)")
    scale.add_argument("--full", action="store_true", help="the papers' sizes, for a GPU")
    scale.add_argument("--report", action="store_true", help="run nothing, show what was found")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts to learn, UTF-8")
    add("--model", type=Path, help="folder of a Llama-style checkpoint, for the part states")
    add("--dataset", type=Path, metavar="FILE", help="text to evaluate it on, UTF-8")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--output", type=Path, default=Path("bench/results"), help="folder (%(default)s)")
    arguments = parser.parse_args(words)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"expected some of {', '.join(PARTS)}, got {part!r}")
    if (arguments.model is None) != (arguments.dataset is None):
        parser.error("--model and --dataset go together")
    for file in (*arguments.text, *filter(None, (arguments.dataset,))):
        if not file.is_file():
            parser.error(f"there is no file {file}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none here")
    return arguments


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"bench.papers.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("bench"):
            raise
        raise SystemExit(
            f"the part {name} needs {error.name}: pip install 'msrnn_ops[papers]'"
        ) from error


def main(words: Sequence[str]) -> None:
    arguments = _arguments(words)
    options = Options(
        arguments.full, arguments.device, tuple(arguments.text), arguments.model, arguments.dataset
    )
    names = [name for name in PARTS if name in (arguments.parts or PARTS) and not arguments.report]
    modules = {name: _module(name) for name in names}  # what is missing is said at once
    if options.model is not None:
        _module("checkpoint")
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "papers-unfinished"
    console = Console(width=None if sys.stdout.isatty() else 120)
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(
            ["python -m bench.papers", *(re.sub(r"[^\s=]*/", "", word) for word in words)]
        ),
        "machine": machine.machine(),
        "versions": machine.versions(),
    }
    for name, module in modules.items():
        console.rule(name, align="left")
        start = time.perf_counter()
        result = module.run(options, Store(unfinished / f"{name}.json", options))
        seconds = time.perf_counter() - start
        file = folder / f"papers-{name}.json"
        stored = {**head, "seconds_taken": seconds, "result": result}
        file.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    found = {name: folder / f"papers-{name}.json" for name in PARTS}
    results = {
        name: json.loads(file.read_text("utf-8")) for name, file in found.items() if file.exists()
    }
    sections = {name: _module(name).section(stored["result"]) for name, stored in results.items()}
    report.show({name: sections[name] for name in names or sections}, console)
    report.write(sections, results, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    console.print(f"Written to {folder / 'papers.html'}")


if __name__ == "__main__":
    reuse_freed_memory()
    main(sys.argv[1:])
