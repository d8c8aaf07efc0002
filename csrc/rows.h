// Which row of a larger state each row of a batch uses: what serving engines call
// conv_state_indices or cache_batch_idx.
#pragma once

#include <cstdint>

#include "inline.h"

namespace msrnn {

struct RowIndex {
  const void* data;  // (batch), int32 or int64; null: row b of the batch uses row b of the state
  bool wide;         // int64
  int64_t count;     // rows of the state

  // -1 where a row of the batch names no row of the state.
  MSRNN_FN int64_t named(int64_t b) const {
    if (!data) return b;
    const int64_t row =
        wide ? static_cast<const int64_t*>(data)[b] : static_cast<const int32_t*>(data)[b];
    return row < 0 || row >= count ? -1 : row;
  }
  // The row of the state, or -1 where a row of the batch does nothing: it names none, or one that
  // an earlier row of the batch has. So no two of them ever meet in one row of the state.
  MSRNN_FN int64_t of(int64_t b) const {
    const int64_t row = named(b);
    if (!data || row < 0) return row;
    for (int64_t i = 0; i < b; ++i) {
      if (named(i) == row) return -1;
    }
    return row;
  }
};

}  // namespace msrnn
