"""``python -m bench``: measures this machine and writes tables, a results file and a picture."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PARTS = {
    "cpu": ("limits", "ops", "steps", "layers", "accuracy", "text"),
    "cuda": ("limits", "steps", "ops", "decoding", "layers", "small"),
}
Measure = Callable[[], Iterable[dict[str, Any]]]


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(map(int, word.split("x"))) for word in _list(text)]
    if not shapes or any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise ValueError
    return shapes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", choices=tuple(PARTS), default="cpu", help="to measure (%(default)s)")
    parts = "; ".join(f"{device}: {','.join(names)}" for device, names in PARTS.items())
    add("--only", type=_list, metavar="PARTS", help=f"some of the device's parts; {parts}")
    add("--ops", type=_list, metavar="OPS", help="some of the ops: min_gru,min_lstm,...")
    add("--shapes", type=_shapes, metavar="SHAPES", help="BxTxD of the ops: 8x512x256,...")
    add("--seconds", type=float, default=0.2, help="per competitor and shape (%(default)s)")
    add("--threads", type=int, help="threads of torch")
    add("--text", type=Path, metavar="FILE", help="text of the language model, UTF-8")
    add("--steps", type=int, help="training steps of the language model")
    add("--full", action="store_true", help="every peer on every op and shape, about 30 minutes")
    add("--output", type=Path, default=Path("bench/results"), help="folder (%(default)s)")
    add("--name", help="of the files in it (the device's)")
    arguments = parser.parse_args()
    arguments.name = arguments.name or arguments.device
    for part in arguments.only or ():
        if part not in PARTS[arguments.device]:
            expected = ",".join(PARTS[arguments.device])
            parser.error(f"--only: expected some of {expected}, got {part!r}")
    return arguments


def _command() -> str:
    """The command line, its files without their folders."""
    return " ".join(["python -m bench", *(re.sub(r"[^\s=]*/", "", word) for word in sys.argv[1:])])


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from bench import machine

    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": _command(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "settings": {"seconds": arguments.seconds, "full": arguments.full},
        "seconds_taken": {},
    }
    if arguments.device == "cuda":
        from bench import cuda_measure

        results["machine"]["gpu"] = cuda_measure.facts(torch.device("cuda"))
    else:
        results["settings"]["freed_memory"] = (
            "Freed memory is reused, for every competitor alike (MALLOC_*)"
        )
    return results


def _ops(arguments: argparse.Namespace) -> list[str]:
    from bench import peers

    ops = arguments.ops or list(peers.OPS)
    unknown = sorted(set(ops) - set(peers.OPS))
    if unknown:
        raise SystemExit(f"--ops: expected some of {','.join(peers.OPS)}, got {','.join(unknown)}")
    return ops


def _measures(arguments: argparse.Namespace) -> dict[str, Measure]:
    """Each part as a call that returns its entries of the results, whenever they have grown."""
    ops, seconds, full = _ops(arguments), arguments.seconds, arguments.full
    if arguments.device == "cuda":
        import torch

        from bench import cuda

        return cuda.measures(torch.device("cuda"), ops, arguments.shapes, seconds, full)

    from bench import layers, limits, scans, steps, text

    shapes = arguments.shapes or scans.SHAPES
    training = arguments.steps or (text.FULL_STEPS if full else text.STEPS)
    return {
        "limits": lambda: [{"limits": limits.run(seconds)}],
        "ops": lambda: [
            {
                "ops": scans.run_ops(ops, shapes, seconds, full),
                "memory": scans.run_memory(ops),
            }
        ],
        "steps": lambda: [
            {
                "steps": steps.run_steps(seconds, full),
                "decoding": steps.run_loop(seconds),
            }
        ],
        "layers": lambda: [{"layers": layers.run(seconds, full)}],
        "accuracy": lambda: [{"accuracy": scans.run_accuracy(seconds, full)}],
        "text": lambda: [{"text": text.run(arguments.text, training)}],
    }


def main() -> None:
    arguments = _arguments()
    if arguments.device == "cpu":
        from bench.measure import reuse_freed_memory

        reuse_freed_memory()

    import torch
    from rich.console import Console

    from bench import plot, report

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m bench: --device cuda needs a GPU, and torch sees none here")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.name}.json"
    results = _settings(arguments)
    for part, measure in _measures(arguments).items():
        if part in (arguments.only or PARTS[arguments.device]):
            start = time.perf_counter()
            for entries in measure():
                results |= entries
                results["seconds_taken"][part] = time.perf_counter() - start
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120)
    report.show(results, console)
    if "accuracy" in results:
        plot.draw(results, path.with_suffix(".png"))
    console.print(f"Written to {path}")


if __name__ == "__main__":
    main()
