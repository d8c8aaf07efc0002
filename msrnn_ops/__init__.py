"""Sequence models with a bounded state: minGRU, minLSTM, their scans, attention with eviction."""

from msrnn_ops import backend as backend  # first: it says so where nothing has been built
from msrnn_ops import nn
from msrnn_ops.backend import backends, build_info, use_backend
from msrnn_ops.multi_state import (
    attend_evict,
    attend_prompt,
    attend_scores,
    attend_sequence,
    evict,
)
from msrnn_ops.scan import (
    decay_scan,
    linear_scan,
    log_scan,
    min_gru,
    min_gru_joint,
    min_gru_step,
    min_lstm,
    min_lstm_joint,
    min_lstm_step,
)
from msrnn_ops.state import MultiState, Policy
from msrnn_ops.version import __version__

__all__ = [
    "MultiState",
    "Policy",
    "__version__",
    "attend_evict",
    "attend_prompt",
    "attend_scores",
    "attend_sequence",
    "backends",
    "build_info",
    "decay_scan",
    "evict",
    "linear_scan",
    "log_scan",
    "min_gru",
    "min_gru_joint",
    "min_gru_step",
    "min_lstm",
    "min_lstm_joint",
    "min_lstm_step",
    "nn",
    "use_backend",
]
