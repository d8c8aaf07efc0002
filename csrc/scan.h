// What every backend of the scans is told: which op it is, and where its tensors lie.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rows.h"

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

// One token of every row of a batch, in place on rows of a larger state.
struct RowStep {
  ScanOp op;    // minGRU or minLSTM
  DType dtype;  // of the inputs
  int64_t batch, channels;
  View input[3];  // time 0 alone
  RowIndex rows;
  char* state;        // (rows of the state, channels), in the accumulation dtype
  int64_t state_row;  // bytes from one row to the next
  char* out;          // (batch, channels), likewise, contiguous: the state after the token
};

}  // namespace msrnn
