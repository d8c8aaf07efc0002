"""The command line of the benchmarks: ``python -m bench --help``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import click
except ImportError as error:
    raise SystemExit(
        "python -m bench: expected the packages of the benchmarks, got no click: "
        'pip install -e ".[bench,papers]" --no-build-isolation'
    ) from error

from bench import papers as the_papers
from bench import run as benchmark
from bench.measure import reuse_freed_memory

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_OUTPUT = Path("build/bench")  # bench/results is what is kept in git


class Commands(click.Group):
    """Hands its words on to the commands; without the name of one they are for ``cpu``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["cpu", *args]
        return super().parse_args(ctx, args)


Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def _output() -> Option:
    text = "Folder of the results; bench/results is the one in git."
    return click.option("--output", type=_FOLDER, default=_OUTPUT, show_default=True, help=text)


def _only(parts: Sequence[str]) -> Option:
    def chosen(_: click.Context, __: click.Parameter, text: str | None) -> list[str] | None:
        names = text.split(",") if text else None
        if unknown := set(names or ()) - set(parts):
            raise click.BadParameter(f"expected some of {','.join(parts)}, got {','.join(unknown)}")
        return names

    text = f"Some of {','.join(parts)}."
    return click.option("--only", metavar="PARTS", callback=chosen, help=text)


def _device() -> Option:
    kinds = click.Choice(("cpu", "cuda"))
    return click.option("--device", type=kinds, default="cpu", callback=_available)


def _available(_: click.Context, __: click.Parameter, device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("this needs a GPU, and torch sees none here")
    return device


@click.group(cls=Commands)
def command() -> None:
    """Measures msrnn_ops; `python -m bench` alone is `python -m bench cpu`."""


@command.command()
@click.option("--full", is_flag=True, help="Every op, shape and peer, and lengths up to 65,536.")
@_only(benchmark.CPU_PARTS)
@_output()
@click.pass_obj
def cpu(words: list[str], /, full: bool, only: list[str] | None, output: Path) -> None:
    """The CPU kernels against what PyTorch users run today: under four minutes, or --full."""
    usual = [part for part in benchmark.CPU_PARTS if full or part != "accuracy"]
    limit = math.inf if full or only else benchmark.LIMIT
    benchmark.run("cpu", only or usual, full, output / "cpu.json", words, limit)


@command.command()
@_output()
@click.pass_obj
def training(words: list[str], /, output: Path) -> None:
    """A layer's training step on a long sequence, time and memory: ten minutes."""
    benchmark.run("cpu", ["training"], False, output / "training.json", words)


@command.command()
@_output()
@click.pass_obj
def small(words: list[str], /, output: Path) -> None:
    """Calls so small that the time is Python's and PyTorch's, on one thread: half a minute."""
    benchmark.run("cpu", ["small"], False, output / "small.json", words)


@command.command()
@click.option("--full", is_flag=True, help="Every peer on every op and shape.")
@_only(benchmark.CUDA_PARTS)
@click.option("--limit", type=float, default=math.inf, help="Seconds after which no row is begun.")
@click.option("--rehearse", is_flag=True, help="Tiny sizes on the CPU: nothing is measured.")
@_output()
@click.pass_obj
def cuda(
    words: list[str], /, full: bool, only: list[str] | None, limit: float, rehearse: bool,
    output: Path,
) -> None:  # fmt: skip
    """The CUDA and Triton kernels against their peers, on a GPU."""
    if not rehearse:
        _available(click.get_current_context(), cuda.params[0], "cuda")
    parts, path = only or benchmark.CUDA_PARTS, output / "cuda.json"
    benchmark.run("cuda", parts, full, path, words, limit, rehearse)


@command.command()
@click.option("--dry-run", is_flag=True, help="Print the table instead of rewriting it.")
def tune(dry_run: bool) -> None:
    """Finds how Triton's kernels should cut up their work on this GPU."""
    _available(click.get_current_context(), tune.params[0], "cuda")
    from bench.cuda import triton_tuning

    triton_tuning.tune(dry_run)


_PARTS = (*the_papers.PARTS, "real", *the_papers.REAL)


@command.command()
@click.argument("parts", nargs=-1, metavar="[PART]...", type=click.Choice(_PARTS))
@click.option("--full", is_flag=True, help="The papers' sizes, for a GPU.")
@click.option("--quick", is_flag=True, help="Of real: minutes instead of hours.")
@click.option("--report", is_flag=True, help="Run nothing, show what was found.")
@click.option("--text", multiple=True, type=_FILE, help="A text to learn, UTF-8; repeatable.")
@click.option("--model", type=_FOLDER, help="A Llama-style checkpoint, for states or real.")
@click.option("--dataset", type=_FILE, help="The text to evaluate it on in states, UTF-8.")
@click.option("--cache", type=_FOLDER, help="Where real keeps the checkpoints it fetches.")
@_device()
@_output()
@click.pass_obj
def papers(
    words: list[str], /, parts: Sequence[str], report: bool, output: Path, **options: Any
) -> None:
    """The experiments of both papers, and one page of what was found.

    \b
    PART: cost, copying, characters, control, states. Without names, all of these.
    real: what follows, on pretrained models, about three hours.
    real-stock, real-perplexity, real-scopes, real-gemma, real-why,
    real-prompt, real-retrieval, real-keys, real-writing, real-throughput.
    """
    named = set(parts or the_papers.PARTS) | (set(the_papers.REAL) if "real" in parts else set())
    chosen = [part for part in (*the_papers.PARTS, *the_papers.REAL) if part in named]
    if "states" in chosen and (options["model"] is None) != (options["dataset"] is None):
        raise click.UsageError("--model and --dataset go together")
    try:
        from bench.papers import run
        from bench.papers.part import Options
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m bench papers: expected its packages, got no {error.name}: "
            'pip install -e ".[bench,papers]" --no-build-isolation'
        ) from error

    run.run([] if report else chosen, Options(**options), output, words)


@command.command()
@click.option("--context", type=click.IntRange(1), default=1, help="Ranks that share a sequence.")
@click.option("--fsdp", is_flag=True, help="fully_shard over all ranks instead of DDP.")
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True)
@click.option("--check", is_flag=True, help="Compare with one process; exit 1 where it differs.")
@click.option("--save", type=_FOLDER, help="Where to put a checkpoint at the end.")
@click.option("--load", type=_FOLDER, help="A checkpoint of any number of ranks.")
@click.option("--json", type=click.Path(path_type=Path), help="A file to add the results to.")
@_device()
@click.pass_obj
def distributed(words: list[str], /, **options: Any) -> None:
    """Data and context parallel training, alone or by `torchrun -m bench distributed`."""
    from bench.papers import distributed

    distributed.run(distributed.Options(**options), words)


_NUMBERS = click.IntRange(1)


@command.command()
@click.option("--model", type=_FOLDER, required=True, help="A Llama-style checkpoint.")
@click.option("--text", type=_FILE, help="What prompts are cut from; default: these pages.")
@click.option("--budget", type=_NUMBERS, default=128, help="MiB of keys and values.")
@click.option("--requests", type=_NUMBERS, default=48, show_default=True)
@click.option("--prompt", type=_NUMBERS, default=512, help="Tokens of each prompt.")
@click.option("--outputs", type=_NUMBERS, default=512, help="Tokens of each answer.")
@click.option("--contexts", type=_NUMBERS, multiple=True, default=(1024, 2048, 4096, 8192))
@click.option("--batches", type=_NUMBERS, multiple=True, default=(1, 4))
@click.option("--slots", type=_NUMBERS, default=512, help="Of the experiment on contexts.")
@click.option("--steps", type=_NUMBERS, default=48, help="Of the experiment on contexts.")
@click.option("--dtype", type=click.Choice(("bfloat16", "float16", "float32")), default="bfloat16")
@click.option("--policy", type=click.Choice(("tova", "window", "h2o")), default="tova")
@click.option("--many", type=_NUMBERS, default=2000, help="Requests, for memory.")
@click.option("--long", type=_NUMBERS, default=4000, help="Tokens of one, for memory.")
@_only(("burst", "contexts", "memory"))
@_output()
@click.pass_obj
def serving(words: list[str], /, only: list[str] | None, output: Path, **options: Any) -> None:
    """Requests behind vLLM, with a bounded state and without."""
    from bench.serving import run

    run.run(run.Options(**options), only or tuple(run.PARTS), output, words)


@command.command()
@click.argument("names", nargs=-1, type=click.Choice(("scans", "steps", "scaling")))
@click.option("--archs", default="80,90,100,120", show_default=True, help="Of the GPUs.")
@_output()
def estimates(names: Sequence[str], archs: str, output: Path) -> None:
    """What GPUs could do, on paper: from the machine code (needs nvcc), and for many ranks."""
    from bench.estimates import run

    run.run(names or ("scans", "steps", "scaling"), archs.split(","), output)


@command.command()
@click.argument("file", type=_FILE)
def report(file: Path) -> None:
    """Prints the tables of a results file as Markdown."""
    from bench.report import page

    print(page(file))


if __name__ == "__main__":
    if "distributed" not in sys.argv:
        reuse_freed_memory()
    command(prog_name="python -m bench")
