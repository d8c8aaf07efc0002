"""The part ``training``: one layer on one long sequence, at once and a chunk at a time."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import msrnn_ops as ms
from bench import peers
from bench.measure import REUSE_FREED_MEMORY, Entries, interleaved, peak_bytes
from bench.table import dimensions, duration, running, say

SHAPE = (1, 65_536, 512)
CHUNK = 512
_SECONDS = 10.0  # of timing for each layer: a step takes one or two


class _Heinsen(nn.Module):
    """A projection and the scan in log-space, as most PyTorch code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 2 * width)
        self.scan = peers.heinsen(peers.OPS["min_gru"])

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.scan(*self.projection(x).chunk(2, -1)), None


def _min_rnn(cell: type[ms.nn.MinGRU] | type[ms.nn.MinLSTM], chunk: int | None) -> Any:
    return lambda width: cell(width, width, batch_first=True, chunk=chunk)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    f"minGRU, chunk={CHUNK}": _min_rnn(ms.nn.MinGRU, CHUNK),
    "minGRU": _min_rnn(ms.nn.MinGRU, None),
    f"minLSTM, chunk={CHUNK}": _min_rnn(ms.nn.MinLSTM, CHUNK),
    "minLSTM": _min_rnn(ms.nn.MinLSTM, None),
    "minGRU, Heinsen": _Heinsen,
    "nn.GRU": lambda width: nn.GRU(width, width, batch_first=True),
}
_OURS = 4  # of them
_PASSES = {"forward": False, "forward and backward": True}


def _pass(
    layer: nn.Module, shape: tuple[int, ...], backward: bool, x: Tensor | None = None
) -> Callable[[], object]:
    x = torch.randn(shape, requires_grad=True) if x is None else x

    def forward() -> Tensor:
        with torch.no_grad():
            output: Tensor = layer(x)[0]
        return output

    if not backward:
        return forward
    wanted, grad = (x, *layer.parameters()), torch.randn(shape)
    return lambda: torch.autograd.grad(layer(x)[0], wanted, grad)


def run() -> Entries:
    """Memory in tensors of B·T·D float32, besides the input and the gradient of the output.

    Times are taken as users have them, where fresh memory costs its page faults; and once more with
    freed memory reused, as in the other parts, where only our layers are timed.
    """
    rows: dict[str, Any] = {name: {"tensors": {}} for name in LAYERS}
    found: dict[str, Any] = {"training": {"shape": SHAPE, "layers": rows}}
    for name, kind in itertools.product(LAYERS, _PASSES):
        with running(f"peak memory of {name}, {kind}"):
            rows[name]["tensors"][kind] = _in_a_process("peak", name, kind)
        say(f"peak memory of {name}, {kind}: {rows[name]['tensors'][kind]} tensors")
        yield found
    for memory, names in (("fresh", list(LAYERS)), ("reused", list(LAYERS)[:_OURS])):
        for kind in _PASSES:
            label = f"{kind} {dimensions(SHAPE)}, {memory} memory"
            with running(label):
                times = _in_a_process("times", ";".join(names), kind, reused=memory == "reused")
            for name, time in (times or {}).items():
                rows[name].setdefault(memory, {})[kind] = time
                say(f"{label}, {name}: {duration(time)}")
            yield found


def _in_a_process(what: str, names: str, kind: str, *, reused: bool = False) -> Any:
    """JSON; None where it cannot be measured."""
    environment = {k: v for k, v in os.environ.items() if k not in REUSE_FREED_MEMORY}
    environment |= REUSE_FREED_MEMORY if reused else {}
    command = [sys.executable, "-m", "bench.cpu.training", what, names, kind]
    child = subprocess.run(
        [*command, str(torch.get_num_threads())], capture_output=True, text=True, env=environment
    )
    return json.loads(child.stdout) if child.returncode == 0 else None


def main(what: str, names: str, kind: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    layers = {name: LAYERS[name](SHAPE[-1]) for name in names.split(";")}
    for layer in layers.values():
        _pass(layer, (1, 16, SHAPE[-1]), _PASSES[kind])()  # threads and libraries start before
    x = torch.randn(SHAPE, requires_grad=True)
    calls = {name: _pass(layer, SHAPE, _PASSES[kind], x) for name, layer in layers.items()}
    if what == "peak":
        (call,) = calls.values()
        print(peak_bytes(call) / (4 * math.prod(SHAPE)))
        return
    for call in calls.values():
        call()
    print(json.dumps(interleaved(calls, _SECONDS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
