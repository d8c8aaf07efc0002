"""The ops over the ranks of a process group: time, heads, channels or rows sharded."""

from typing import TYPE_CHECKING, Any

from msrnn_ops.distributed.multi_state import attend_evict, attend_prompt
from msrnn_ops.distributed.nn import shard_time
from msrnn_ops.distributed.scan import (
    decay_scan,
    linear_scan,
    log_scan,
    min_gru,
    min_gru_joint,
    min_lstm,
    min_lstm_joint,
)

if TYPE_CHECKING:
    from msrnn_ops.operators.sharding import distribute_state

__all__ = [
    "attend_evict",
    "attend_prompt",
    "decay_scan",
    "distribute_state",
    "linear_scan",
    "log_scan",
    "min_gru",
    "min_gru_joint",
    "min_lstm",
    "min_lstm_joint",
    "shard_time",
]


def __getattr__(name: str) -> Any:
    if name != "distribute_state":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from msrnn_ops.operators.sharding import distribute_state  # DTensor takes long to import

    return distribute_state
