"""Runs the parts of a benchmark, shows what they find, and writes it at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Entries
from bench.table import console, say, show

CPU_PARTS = ("steps", "ops", "layers", "decoding", "memory", "limits", "accuracy")
CUDA_PARTS = ("limits", "ops", "steps", "decoding", "triton", "peers", "layers", "small")
LIMIT = 200.0  # seconds of the usual run, on a slow or busy machine too
_SECONDS = 0.2  # of timing for each competitor and shape

Parts = dict[str, Callable[[], Entries]]


def _cpu_parts(full: bool) -> Parts:
    from bench.cpu import accuracy, layers, limits, memory, ops, small, steps, training

    return {
        "steps": partial(steps.run, _SECONDS, full),
        "ops": partial(ops.run, _SECONDS, full),
        "layers": partial(layers.run, _SECONDS, full),
        "decoding": partial(steps.run_decoding, _SECONDS),
        "memory": memory.run,
        "limits": partial(limits.run, _SECONDS),
        "accuracy": partial(accuracy.run, _SECONDS, full),
        "training": training.run,
        "small": partial(small.run, _SECONDS),
    }


def _cuda_parts(full: bool, rehearse: bool) -> Parts:
    import torch

    from bench.cuda import gpu, layers, limits, ops, small, stand_in, steps

    if rehearse:
        stand_in.shrink()
    device = stand_in.StandIn() if rehearse else gpu.Gpu(torch.device("cuda"))
    decoder: dict[str, Any] = stand_in.DECODER if rehearse else {}
    device.warm_up()
    return {
        "limits": partial(limits.run, device, _SECONDS),
        "ops": partial(ops.run, device, _SECONDS),
        "steps": partial(steps.run, device, _SECONDS, full),
        "decoding": partial(steps.run_decoding, device, _SECONDS, **decoder),
        "triton": partial(ops.run_triton, device, _SECONDS, full),
        "peers": partial(ops.run_peers, device, _SECONDS, full),
        "layers": partial(layers.run, device, _SECONDS),
        "small": partial(small.run, device, _SECONDS),
    }


def _head(
    device: str, parts: Sequence[str], full: bool, words: Sequence[str], rehearse: bool
) -> dict[str, Any]:
    from bench import machine

    head = machine.head("python -m bench", words)
    head |= {"settings": {"seconds": _SECONDS, "full": full}, "seconds_taken": {}}
    if device == "cuda":
        from bench.cuda import gpu, stand_in

        head["machine"]["gpu"] = stand_in.FACTS if rehearse else gpu.facts()
        head["rehearsal"] = rehearse
    elif "training" not in parts:  # which takes both
        head["settings"]["freed_memory"] = (
            "Freed memory is reused, for every competitor alike (MALLOC_*)"
        )
    return head


def write(path: Path, results: dict[str, Any]) -> None:
    """At once, so that whoever is stopped here leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new.replace(path)


def run(
    device: str,
    parts: Sequence[str],
    full: bool,
    path: Path,
    words: Sequence[str],
    limit: float = math.inf,
    rehearse: bool = False,
) -> None:
    """After `limit` seconds no row of a table is begun any more.

    What stood at the path stays there to the end; what is there so far has the ending .partial.
    """
    from bench import report

    partial_path = path.with_suffix(".partial")

    end = time.perf_counter() + limit
    results = _head(device, parts, full, words, rehearse)
    found = _cuda_parts(full, rehearse) if device == "cuda" else _cpu_parts(full)
    for part in parts:
        start = time.perf_counter()
        if start < end:
            say(f"{part}:")
            for entries in found[part]():
                results |= entries
                results["seconds_taken"][part] = time.perf_counter() - start
                write(partial_path, results)
                if time.perf_counter() > end:
                    break
        if time.perf_counter() > end:
            say(f"the time is up: python -m bench {device} --only {part} runs all of it")
    if results["seconds_taken"]:
        write(path, results)
    partial_path.unlink(missing_ok=True)
    console().print(f"\n{report.heading(results)}", highlight=False, markup=False)
    show(*report.tables(results))
    if "accuracy" in results:
        from bench.cpu import accuracy

        accuracy.draw(results, path.with_suffix(".png"))
    say(f"written to {path}")
