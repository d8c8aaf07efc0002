"""The ops over the ranks of a process group: time, heads, channels or rows sharded."""

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

__all__ = [
    "decay_scan",
    "linear_scan",
    "log_scan",
    "min_gru",
    "min_gru_joint",
    "min_lstm",
    "min_lstm_joint",
    "shard_time",
]
