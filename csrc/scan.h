// What every backend of the scans is told: which op it is, and where its tensors lie.
#pragma once

#include <cstdint>

namespace msrnn {

enum class ScanOp : int32_t {
  linear_scan,
  decay_scan,
  log_scan,
  min_gru_g,
  min_gru_identity,
  min_lstm_g,
  min_lstm_identity,
};

// A tensor indexed (row, time, channel), with strides in bytes. It is absent if `data` is null.
struct View {
  char* data;
  int64_t row, time, channel;
};

}  // namespace msrnn
