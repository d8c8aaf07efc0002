"""``python -m bench.serving.engine JOB``: one engine in a process of its own, and what it measured.

A job is JSON: see :class:`Job`. The last line printed is JSON, too. Every token is asked for (the
end-of-sequence token stops nobody), greedily.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WARM_UP = 4  # tokens


@dataclass(frozen=True)
class Job:
    """What an engine is and serves."""

    model: str
    dtype: str
    policy: dict[str, Any] | None  # None: vLLM as it is
    budget: int  # bytes of keys and values
    block_tokens: int  # of vLLM as it is
    context: int  # longest
    requests: int  # most at once
    prompts: list[list[list[int]]]  # of one burst after the other
    outputs: list[int]  # tokens of each request of a burst


def bytes_of_token(config: Any, size: int) -> int:
    """Keys and values of a token in all layers."""
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * size)


def make(job: Job) -> Any:
    import torch
    from transformers import AutoConfig
    from vllm import EngineArgs, LLMEngine

    token = bytes_of_token(
        AutoConfig.from_pretrained(job.model), getattr(torch, job.dtype).itemsize
    )
    in_block = job.policy["slots"] + 1 if job.policy else job.block_tokens
    settings: dict[str, Any] = {"block_size": job.block_tokens}
    if job.policy:
        settings = {
            "attention_backend": "CUSTOM", "additional_config": {"msrnn": job.policy},
        }  # fmt: skip
    arguments = EngineArgs(
        model=job.model,
        dtype=job.dtype,
        seed=0,
        enforce_eager=not torch.cuda.is_available(),  # in CUDA graphs on a GPU
        max_model_len=job.context,
        max_num_seqs=job.requests,
        max_num_batched_tokens=max(job.context, 2048),
        num_gpu_blocks_override=1 + job.budget // (token * in_block),  # the first serves nobody
        enable_prefix_caching=False,
        async_scheduling=False,
        **settings,
    )
    engine = LLMEngine.from_engine_args(arguments)
    if job.policy:
        from msrnn_ops.vllm.backend import Backend

        if Backend.policy is None:
            raise RuntimeError("vLLM did not find the plugin: install msrnn_ops again")
    return engine


def serve(engine: Any, prompts: list[list[int]], outputs: int, name: str) -> dict[str, Any]:
    """All requests arrive at once; the times are seconds from then on."""
    from vllm import SamplingParams

    scheduler = engine.engine_core.engine_core.scheduler
    settings = SamplingParams(max_tokens=outputs, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, settings)
    requests = list(scheduler.requests.values())
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    # Time, requests in flight, tokens so far, resident memory in MiB.
    running: list[tuple[float, ...]] = []
    tokens: dict[str, int] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter() - start
            tokens[output.request_id] = len(output.outputs[0].token_ids)
            first.setdefault(output.request_id, now)
            if output.finished:
                last[output.request_id] = now
        so_far = time.perf_counter() - start
        running.append((so_far, len(scheduler.running), sum(tokens.values()), _resident()))
    # The last step leaves none in flight.
    in_flight = [count for _, count, _, _ in running[:-1]] or [len(prompts)]
    one = [(last[x] - first[x]) / max(1, tokens[x] - 1) for x in last]
    return {
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(tokens.values()),
        "seconds": running[-1][0],
        "in_flight": max(in_flight),
        "preemptions": sum(x.num_preemptions for x in requests),
        "first_token": sorted(first.values()),
        "latency": sorted(last.values()),
        "token_seconds": sorted(one),  # of each request, after its first token
        "course": _thinned(running),
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _thinned(points: list[tuple[float, ...]], most: int = 200) -> list[tuple[float, ...]]:
    every = -(-len(points) // most)
    return [(round(t, 3), *rest) for t, *rest in [*points[:-1:every], points[-1]]]


def bursts(job: Job) -> Iterator[dict[str, Any]]:
    engine = make(job)
    serve(engine, [[1, 2, 3]], _WARM_UP, "warm-up")
    for n, (prompts, outputs) in enumerate(zip(job.prompts, job.outputs, strict=True)):
        yield serve(engine, prompts, outputs, f"burst-{n}")


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is looked at between steps
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(1 + job.budget // 2**30),
    }
    found = list(bursts(job))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"bursts": found, "process_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
