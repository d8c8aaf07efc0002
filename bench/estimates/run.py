"""Runs the estimates, shows them and keeps those that come from the machine code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.estimates import roofline, scaling, step_roofline
from bench.table import say, show

_MEASURED = {"scans": roofline, "steps": step_roofline}


def run(names: Sequence[str], archs: Sequence[str], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "scaling":
            show(*scaling.tables())
            continue
        say(f"{name}: compiling for {', '.join(f'sm_{arch}' for arch in archs)}")
        rows, tables = _MEASURED[name].run(archs)
        show(*tables)
        results = {"machines": [asdict(machine) for machine in roofline.MACHINES], "rows": rows}
        file = output / f"{_MEASURED[name].__name__.rpartition('.')[2]}.json"
        file.write_text(re.sub(r"(\.\d{6})\d+", r"\1", json.dumps(results, indent=1)) + "\n")
        say(f"written to {file}")
