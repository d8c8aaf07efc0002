"""Measures how Triton's kernels should cut up their work, and rewrites triton_kernels/tuning.py.

    python -m bench tune [--dry-run]

Needs a GPU. Every entry of the table is tried with each candidate at a shape that uses it; the
fastest stays. Kernels take their entry from the table and nothing is tuned at a first call, so that
how long a call takes does not depend on who called before.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import msrnn_ops as ms
from bench.cuda.gpu import Call, Gpu, facts, failed, release
from bench.step_peers import Heads, Tokens, full_state, ours
from bench.table import say

_FILE = Path(ms.__file__).resolve().parent / "triton_kernels/tuning.py"
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_SHAPES = {"walk": (32, 2048, 2048), "segments": (4, 8192, 4096), "chunks": (1, 131072, 512)}
_SCANS: dict[str, list[tuple[int, ...]]] = {
    "walk": list(itertools.product((1,), (4, 8, 16, 32), (32, 64, 128), (1, 2))),
    "segments": list(itertools.product((8, 16, 32), (2, 4, 8), (32, 64), (2, 4))),
    "chunks": list(itertools.product((1, 8), (4, 8, 16, 32), (32, 64, 128), (1, 2))),
}
_STEPS = list(itertools.product((16, 32, 64, 128), (4, 8), (2, 3, 4)))
_STEP_SHAPES = ((1, 8192), (16, 1024))  # rows, slots: the sum of both counts
_HEADER = '''"""How the kernels cut up their work: `python -m bench tune` rewrites this.

{}
"""

# (pass, form, bytes of an element, inputs of the op): segments, rows of a segment, channels of a
# block, warps. Forms: "walk", rows and channels fill a GPU; "segments", they nearly do; "chunks".
SCANS: dict[tuple[str, str, int, int], tuple[int, ...]] = {}

# (bytes of an element, head_dim rounded up to a power of 2): slots that a program has at once,
# warps, blocks of slots under way.
STEPS: dict[tuple[int, int], tuple[int, ...]] = {}
'''


def _scan_call(gpu: Gpu, backward: bool, form: str, size: int, inputs: int) -> Call:
    tensors = [gpu.randn(*_SHAPES[form]).to(_DTYPES[size]) for _ in range(inputs)]
    function: Callable[..., Any] = ms.min_gru if inputs == 2 else ms.min_lstm
    if not backward:
        return lambda: function(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    h = function(*leaves)
    grad = torch.randn_like(h)
    return lambda: torch.autograd.grad(h, leaves, grad, retain_graph=True)


def _step_call(gpu: Gpu, size: int, head_dim: int) -> Call:
    heads = Heads(4096 // head_dim, 1024 // head_dim, head_dim)
    steps = []
    with gpu.device:
        for batch, slots in _STEP_SHAPES:
            tokens = Tokens.draw(batch, _DTYPES[size], heads)
            state = full_state(ms.Policy.tova(slots), batch, _DTYPES[size], heads)
            steps.append(ours(state, tokens))
    return lambda: [step() for step in steps]


def _best(
    gpu: Gpu, call: Call, candidates: Iterable[tuple[int, ...]],
    choose: Callable[[tuple[int, ...]], None], seconds: float,
) -> tuple[int, ...] | None:  # fmt: skip
    """The candidate with which a call is fastest, those that do not compile left out."""
    times = {}
    for candidate in candidates:
        choose(candidate)
        try:
            call()
            replay, _ = gpu.captured(call)
            times[candidate] = gpu.interleaved({"": replay}, seconds)[""]["median"]
        except Exception as problem:
            failed(str(candidate), problem)
    return min(times, key=lambda candidate: times[candidate]) if times else None


def _table(entries: Mapping[Any, tuple[int, ...]]) -> str:
    lines = [f"    {key}: {value},".replace("'", '"') for key, value in entries.items()]
    return "\n".join(["{", *lines, "}"])


def tune(dry_run: bool, seconds: float = 0.1) -> None:
    from msrnn_ops.triton_kernels import multi_state, tuning

    gpu = Gpu(torch.device("cuda"))
    gpu.warm_up()
    scans, steps = tuning.SCANS, tuning.STEPS
    with ms.use_backend("triton"):
        for key in list(scans):
            which, form, size, inputs = key
            call = _scan_call(gpu, which == "backward", form, size, inputs)

            def choose_scan(tile: tuple[int, ...], key: Any = key) -> None:
                scans[key] = tile

            before = scans[key]
            found = _best(gpu, call, _SCANS[form], choose_scan, seconds)
            scans[key] = found or before
            say(f"{key}: {before} -> {scans[key]}")
            release()
        for pair in list(steps):

            def choose_step(tile: tuple[int, ...], pair: Any = pair) -> None:
                steps[pair] = tile
                multi_state.plan.cache_clear()

            old = steps[pair]
            best = _best(gpu, _step_call(gpu, *pair), _STEPS, choose_step, seconds)
            choose_step(best or old)
            say(f"{pair}: {old} -> {steps[pair]}")
            release()
    name = facts()["name"]
    note = f"Measured on {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    text = _HEADER.format(note, _table(scans), _table(steps))
    if dry_run:
        print(text)
    else:
        _FILE.write_text(text, "utf-8")
