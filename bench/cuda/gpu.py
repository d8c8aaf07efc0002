"""Timing on a CUDA device: events around graph replays, a cold L2; and facts about the device.

Imports nothing of msrnn_ops, so that it serves before the extension is built.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bench.measure import Timing, largest_error, timing
from bench.table import say

Call = Callable[[], object]

DTYPES = (torch.bfloat16, torch.float32)
_ROUNDS = 5
_MOST = 20  # calls of a competitor in a round
_WARM_UP = 0.5  # seconds of work after which an idle device has raised its clocks
_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
)


def failed(name: str, problem: Exception) -> dict[str, Any]:
    """The entry of what this machine cannot compile, hold or run; the message is not kept."""
    say(f"{name} failed: {problem!r:.200}")
    return {"failed": type(problem).__name__}


class Gpu:
    """The device under test.

    Everything runs on one stream of its own: only a stream other than the default can be captured,
    and autograd runs a backward pass on the stream of its forward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_stream(torch.cuda.Stream(device))
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._cache = torch.empty(max(size // 4, 1), device=device)
        self._sum = torch.empty((), device=device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def copy(self, traffic: int) -> Call:
        """A device-to-device copy that moves `traffic` bytes, half of them read."""
        source, target = (self.randn(max(traffic // 8, 1)) for _ in range(2))
        return lambda: target.copy_(source)

    def warm_up(self) -> None:
        end = time.perf_counter() + _WARM_UP
        while time.perf_counter() < end:
            self._empty_cache()
            torch.cuda.synchronize()

    def capture(self, call: Call) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool, torch.cuda.current_stream()):
                call()
        except Exception:
            # Torch 2.11 leaves its allocator in a capture that failed. It would not empty its cache
            # then, with which every capture begins. Later ones have left it: an error here.
            device = torch.cuda.current_device()
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            raise
        return graph

    def captured(self, call: Call, count: int = 1) -> tuple[Call, bool]:
        """`count` calls as the replay of one graph; as plain calls, and False, where that fails.

        The call must have been warmed up. What a call reads must outlive it.
        """

        def calls() -> None:
            for _ in range(count):
                call()

        try:
            graph = self.capture(calls)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a library that synchronizes or allocates behind torch's back
            torch.cuda.synchronize()
            self.capture(self.empty_kernel)  # or randn would raise: its generator was captured too
            return calls, False

        def replay(_alive: Call = call) -> None:  # the graph does not keep the call's tensors
            graph.replay()

        return replay, True

    def interleaved(
        self, calls: Mapping[str, Call], seconds: float, *, cold: bool = True
    ) -> dict[str, Timing]:
        """Times each call for about `seconds`, in turns, with the L2 emptied before each or not."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            self._times(call, 1, cold)
            times[name] += self._times(call, 1, cold)
        counts = {name: self._count(mine[0], seconds) for name, mine in times.items()}
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                times[name] += self._times(call, counts[name], cold)
        return {name: timing(mine[1:]) for name, mine in times.items()}

    def peak_bytes(self, call: Call) -> int:
        """Peak of the memory that tensors take during a call, above what they take before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def empty_kernel(self) -> None:
        """A kernel of one thread that waits for no clock ticks."""
        torch.cuda._sleep(0)

    def _empty_cache(self) -> None:
        """Replaces what the L2 holds. Read after it is written, so that no line is left dirty:
        else the timed call would pay for writing it back."""
        self._cache.zero_()
        torch.sum(self._cache, 0, out=self._sum)

    def _times(self, call: Call, count: int, cold: bool) -> list[float]:
        events = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                self._empty_cache()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    @staticmethod
    def _count(first: float, seconds: float) -> int:
        """Calls in a round."""
        return max(1, min(_MOST, round(seconds / _ROUNDS / max(first, 1e-6))))


def worst_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """`largest_error` of the worst tensor, NaN where any of them holds one."""
    pairs = zip(values, truths, strict=True)
    return float(torch.tensor([largest_error([x], [truth]) for x, truth in pairs]).max())


def release() -> None:
    """Gives the memory of dropped graphs and tensors back to the device."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _smi() -> dict[str, str]:
    """What nvidia-smi says of the first device it lists; nothing where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = child.stdout.splitlines()[0].split(",") if child.stdout.strip() else []
    return dict(zip(_SMI, map(str.strip, values), strict=False))


def facts() -> dict[str, Any]:
    """Of the first device."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **_smi(),
    }


def divided(taken: Timing, by: int) -> Timing:
    return {k: v if k == "count" else v / by for k, v in taken.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
