"""``python -m bench serving``: one budget of cache memory, vLLM as it is beside a bounded state.

Three experiments, each competitor in a process of its own, one after the other:

- ``burst``: more requests with long outputs than vLLM's pages hold. It has to preempt; at 1/8 and
  1/4 of the states all or most are served at once.
- ``contexts``: requests alone and in batches, with contexts from short to long, after their prompt:
  what a step takes; competitors take turns, and the median counts.
- ``memory``: what the process of a bounded state holds, over many requests and over a long one.

Prompts are pieces of a text.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.run import write
from bench.serving.engine import Job
from bench.table import Table, running, say, show

STOCK = "vLLM"
_TURNS = 3  # of the competitors, whose steps vary by a tenth from process to process
_TEXT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: Path
    budget: int  # MiB
    requests: int
    prompt: int
    outputs: int
    contexts: Sequence[int]
    batches: Sequence[int]
    slots: int  # of the experiment on contexts
    steps: int
    dtype: str
    policy: str
    many: int  # requests, of the experiment on memory
    long: int  # tokens, likewise
    text: Path | None = None


def _tokens(options: Options) -> list[int]:
    """Of a text: by default, of the pages of this repository."""
    from transformers import AutoTokenizer

    paths = [options.text] if options.text else sorted(_TEXT.glob("docs/*.md"))
    text = "\n".join(path.read_text("utf-8") for path in paths)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError):  # a model without one
        return list(text.encode())
    return list(map(int, tokenizer(text)["input_ids"]))


def _pieces(tokens: list[int], count: int, length: int, at: int = 0) -> list[list[int]]:
    """Neighbouring ones, again from the start where the text ends."""
    endless = itertools.islice(itertools.cycle(tokens), at, None)
    return [list(itertools.islice(endless, length)) for _ in range(count)]


def _run(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.serving.engine"]
    environment = {**os.environ, "PYTHONPATH": str(_TEXT)}
    done = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"python -m bench serving: an engine failed\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _competitors(options: Options, slots: Sequence[int]) -> Iterator[tuple[str, Any]]:
    yield STOCK, None
    for n in slots:
        yield f"{options.policy} {n}", {"policy": options.policy, "slots": n}


def burst(options: Options, tokens: list[int]) -> dict[str, Any]:
    context = options.prompt + options.outputs
    found = {}
    prompts = _pieces(tokens, options.requests, options.prompt)
    for name, policy in _competitors(options, [context // 8, context // 4]):
        job = Job(
            str(options.model), options.dtype, policy, options.budget << 20, 32, context,
            options.requests, [prompts], [options.outputs],
        )  # fmt: skip
        with running(f"burst: {name}"):
            result = _run(job)
        found[name] = {**result["bursts"][0], "process_bytes": result["process_bytes"]}
        one = found[name]
        say(
            f"burst: {name}: {one['in_flight']} in flight, {one['preemptions']} preemptions,"
            f" {one['output_tokens'] / one['seconds']:.1f} tokens/s"
        )
    return found


def contexts(options: Options, tokens: list[int]) -> dict[str, Any]:
    longest = max(options.contexts)
    cases = [
        (batch, context)
        for batch in options.batches
        for context in options.contexts
        if batch * context <= max(longest, 8192)
    ]
    prompts = [_pieces(tokens, batch, context - options.steps) for batch, context in cases]
    rates: dict[str, list[list[float]]] = {}
    for turn in range(_TURNS):
        for name, policy in _competitors(options, [options.slots]):
            job = Job(
                str(options.model), options.dtype, policy, 2 << 30, 32, longest,
                max(options.batches), prompts, [options.steps] * len(cases),
            )  # fmt: skip
            with running(f"contexts: {name}, {turn + 1} of {_TURNS}"):
                result = _run(job)
            rates.setdefault(name, []).append([_rate(one) for one in result["bursts"]])
            say(f"contexts: {name}: {', '.join(f'{x:.1f}' for x in rates[name][-1])} tokens/s")
    return {
        name: {
            f"{batch} x {context}": statistics.median(turns)
            for (batch, context), *turns in zip(cases, *of_turns, strict=True)
        }
        for name, of_turns in rates.items()
    }


def memory(options: Options, tokens: list[int]) -> dict[str, Any]:
    """Resident MiB when an eighth of the tokens are there, and when all are."""
    policy = {"policy": options.policy, "slots": options.slots}
    many, long = options.many, options.long
    prompts = [_pieces(tokens, many, 16), _pieces(tokens, 1, 64)]
    job = Job(
        str(options.model), options.dtype, policy, options.budget << 20, 32, long + 64, 16,
        prompts, [4, long],
    )  # fmt: skip
    with running("memory"):
        result = _run(job)
    found = {}
    names = (f"{many} requests of 16 + 4 tokens", f"one request of 64 + {long} tokens")
    for name, one in zip(names, result["bursts"], strict=True):
        total = one["output_tokens"]
        early = next(point[3] for point in one["course"] if point[2] >= total / 8)
        found[name] = {"early": early, "late": one["course"][-1][3], "seconds": one["seconds"]}
        say(f"memory: {name}: {early} MiB, in the end {found[name]['late']} MiB")
    return found


def _rate(one: dict[str, Any]) -> float:
    """Tokens a second of all requests, while they generate."""
    return float(one["requests"]) / statistics.median(one["token_seconds"])


def tables(results: dict[str, Any]) -> list[Table]:
    found: list[Table] = []
    if "burst" in results:
        found.append(_burst_table(results["settings"], results["burst"]))
    if "contexts" in results:
        names = list(results["contexts"])
        ours = names[-1]
        rows = [
            [case, *(f"{results['contexts'][name][case]:.1f}" for name in names),
             f"{results['contexts'][ours][case] / results['contexts'][STOCK][case]:.2f}"]
            for case in results["contexts"][STOCK]
        ]  # fmt: skip
        found.append(
            Table(
                "Tokens/s after the prompt", "", ["requests x context", *names, "times vLLM"], rows
            )
        )
    if "memory" in results:
        rows = [
            [name, f"{one['early']}", f"{one['late']}"] for name, one in results["memory"].items()
        ]
        columns = ["", "after 1/8, MiB", "in the end, MiB"]
        found.append(Table("Memory of the process", "", columns, rows))
    return found


PARTS = {"burst": burst, "contexts": contexts, "memory": memory}


def _burst_table(settings: dict[str, Any], burst: dict[str, Any]) -> Table:
    stock = burst[STOCK]["output_tokens"] / burst[STOCK]["seconds"]
    rows = []
    for name, one in burst.items():
        speed = one["output_tokens"] / one["seconds"]
        rows.append([
            name, f"{one['in_flight']}", f"{while_others_wait(one):.1f}", f"{one['preemptions']}",
            f"{speed:.1f}", f"{speed / stock:.2f}", f"{statistics.median(one['first_token']):.1f}",
            f"{statistics.median(one['latency']):.1f}", f"{_high(one['latency']):.1f}",
            f"{one['process_bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    columns = [
        "", "in flight, most", "while others wait", "preemptions", "tokens/s",
        "times vLLM", "first token, p50, s", "latency, p50, s", "latency, p99, s", "process, MiB",
    ]  # fmt: skip
    note = (
        f"{settings['requests']} requests of {settings['prompt']} + {settings['outputs']} tokens"
        f" at once, {settings['budget']} MiB of keys and values"
    )
    return Table("A burst of requests", note, columns, rows)


def while_others_wait(one: dict[str, Any]) -> float:
    """Requests in flight, on average over the steps at which there are others that wait."""
    counts = [
        running
        for t, running, *_ in one["course"]
        if running + sum(end <= t for end in one["latency"]) < one["requests"]
    ]
    return statistics.mean(counts) if counts else float(one["in_flight"])


def _high(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return values[min(len(values) - 1, int(0.99 * len(values)))]


def heading(results: dict[str, Any]) -> str:
    settings, versions = results["settings"], results["versions"]
    return (
        f"{results['machine']['processor']}, {results['machine']['cores']} cores, vLLM "
        f"{versions['vllm']}, {settings['model']} in {settings['dtype']}, {results['date']}"
    )


def draw(burst: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (flight, done) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, one in burst.items():
        times = [point[0] for point in one["course"]]
        flight.plot(times, [point[1] for point in one["course"]], label=name)
        done.plot(times, [point[2] for point in one["course"]], label=name)
    flight.set(xlabel="seconds", ylabel="requests in flight", ylim=(0, None))
    done.set(xlabel="seconds", ylabel="tokens generated", ylim=(0, None))
    done.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run(options: Options, only: Sequence[str], output: Path, words: Sequence[str]) -> None:
    try:
        import vllm
    except ImportError as error:
        raise SystemExit(
            "python -m bench serving: expected vLLM 0.32, got none: docs/vllm.md says how to "
            "install it"
        ) from error
    results = machine.head("python -m bench", words)
    results["versions"] |= {"vllm": vllm.__version__}
    names = ("budget", "requests", "prompt", "outputs", "slots", "steps", "dtype", "policy")
    results["settings"] = {
        "model": options.model.name, **{name: getattr(options, name) for name in names},
    }  # fmt: skip
    tokens = _tokens(options)
    for part, measure in PARTS.items():
        if part in only:
            results[part] = measure(options, tokens)
            write(output / "serving.partial", results)
    (output / "serving.partial").unlink(missing_ok=True)
    write(output / "serving.json", results)
    show(*tables(results))
    if "burst" in results:
        draw(results["burst"], output / "serving.png")
    say(f"written to {output / 'serving.json'}")
