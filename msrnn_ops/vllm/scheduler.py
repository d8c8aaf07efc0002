"""A scheduler of vLLM under which a preempted request comes to the state that it had.

vLLM computes a preempted request again as one prompt, of its prompt and of what it has generated.
A prompt is reduced to N states once, but generated tokens evict one by one, so the states would
differ. Only the scheduler knows where a prompt ends.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

__all__ = ["Scheduler"]


class Scheduler(AsyncScheduler):  # type: ignore[misc]
    """Computes the prompt of a resumed request first, and then its other tokens one by one.

    Other requests are scheduled as ever. ``--scheduler-cls msrnn_ops.vllm.scheduler.Scheduler``.
    """

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM asks here, for each request, whether to compute fewer tokens than it could."""
        left = request.num_prompt_tokens - num_computed_tokens
        return min(num_new_tokens, left if left > 0 else 1)
