"""Fused recurrences for sequence models with a bounded state: minGRU, minLSTM and their scans."""

from msrnn_ops.backend import backends, use_backend
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
from msrnn_ops.version import __version__

__all__ = [
    "__version__",
    "backends",
    "build_info",
    "decay_scan",
    "linear_scan",
    "log_scan",
    "min_gru",
    "min_gru_joint",
    "min_gru_step",
    "min_lstm",
    "min_lstm_joint",
    "min_lstm_step",
    "use_backend",
]


def build_info() -> dict[str, object]:
    """How this build was made: version, compiler, targeted torch ABI, CUDA, instruction sets."""
    from msrnn_ops._C import build_info as info

    return dict(info())
