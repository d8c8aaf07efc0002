"""What stands in a results file, as Markdown: ``python -m bench report bench/results/cpu.json``."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.table import Table, markdown


def _of(results: dict[str, Any]) -> ModuleType:
    if "bench serving" in results["command"]:
        return import_module("bench.serving.run")
    return import_module(f"bench.{'cuda' if 'gpu' in results['machine'] else 'cpu'}.report")


def heading(results: dict[str, Any]) -> str:
    text: str = _of(results).heading(results)
    return text


def tables(results: dict[str, Any]) -> list[Table]:
    found: list[Table] = _of(results).tables(results)
    return found


def page(file: Path) -> str:
    results = json.loads(file.read_text("utf-8"))
    if not file.stem.startswith("papers-"):
        return "\n\n".join([heading(results), *map(markdown, tables(results))])
    from bench.papers.report import chapter

    part = import_module(f"bench.papers.{file.stem.removeprefix('papers-').replace('-', '.')}")
    return chapter(part.section(results["result"]))
