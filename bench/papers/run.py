"""Runs the parts of ``python -m bench papers`` and makes one page of what they found.

Every part leaves its results in a file; the page shows those of all parts that are there.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench import machine
from bench.papers import PARTS, REAL, report
from bench.papers.part import Options, Store
from bench.run import write
from bench.table import say


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"bench.papers.{name.replace('-', '.')}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("bench"):
            raise
        raise SystemExit(
            f"the part {name} needs {error.name}: pip install 'msrnn_ops[papers]'"
        ) from error


def run(names: Sequence[str], options: Options, folder: Path, words: Sequence[str]) -> None:
    modules = {name: _module(name) for name in names}  # what is missing is said at once
    if options.model is not None:
        _module("checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "papers-unfinished"
    head = machine.head("python -m bench", words)
    for name, module in modules.items():
        say(f"{name}:")
        start = time.perf_counter()
        store = Store(unfinished / f"{getattr(module, 'STORE', name)}.json", options)
        result = module.run(options, store)
        seconds = store.seconds_before + time.perf_counter() - start
        write(folder / f"papers-{name}.json", {**head, "seconds_taken": seconds, "result": result})
    found = {name: folder / f"papers-{name}.json" for name in (*PARTS, *REAL)}
    results = {
        name: json.loads(file.read_text("utf-8")) for name, file in found.items() if file.exists()
    }
    sections = {name: _module(name).section(stored["result"]) for name, stored in results.items()}
    report.show({name: sections[name] for name in names or sections})
    page = report.write(sections, results, folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    say(f"written to {page}")
