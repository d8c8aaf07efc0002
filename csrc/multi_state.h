// The state of multi-state attention as every backend sees it: raw pointers and no torch.
#pragma once

#include "dtype.h"
#include "eviction.h"
#include "rows.h"

namespace msrnn {

constexpr int64_t kLargestHeadDim = 256;

// Tensors are contiguous.
struct State {
  char *keys, *values;  // (batch, kv_heads, slots, head_dim)
  int64_t* position;    // (batch, groups, slots); -1: empty
  float* score;         // likewise, or null
  int64_t* free;        // (batch, groups): the slot of the next token
  int64_t* last_evicted;
  int64_t* seen;                                     // (batch)
  int64_t batch, kv_heads, groups, slots, head_dim;  // batch: rows of the state
  DType dtype;

  MSRNN_FN int64_t row_bytes() const { return head_dim * (dtype == DType::float32 ? 4 : 2); }
  MSRNN_FN int64_t row_offset(int64_t row, int64_t head, int64_t slot) const {  // bytes
    return ((row * kv_heads + head) * slots + slot) * row_bytes();
  }
  MSRNN_FN int64_t group_of(int64_t head) const { return groups == 1 ? 0 : head; }
  MSRNN_FN int64_t group(int64_t row, int64_t g) const { return row * groups + g; }
  // How many slots tokens may have reached, since the lowest empty slot is filled first.
  MSRNN_FN int64_t used(int64_t row) const {
    const int64_t count = seen[row];
    return count >= slots ? slots : count < 0 ? 1 : count + 1;
  }
  // The slot of the next token, in bounds whatever `free` holds.
  MSRNN_FN int64_t free_slot(int64_t row, int64_t g) const {
    const int64_t slot = free[group(row, g)];
    return slot < 0 ? 0 : slot >= slots ? slots - 1 : slot;
  }

  // Drops the victim if no slot is left, and finds a slot for the next token.
  MSRNN_FN void evict(int64_t row, int64_t g, const Summary& summary) const {
    const int64_t i = group(row, g), offset = i * slots;
    last_evicted[i] = -1;
    if (summary.occupied == slots && summary.victim.slot >= 0) {
      last_evicted[i] = summary.victim.position;
      free[i] = summary.victim.slot;
      position[offset + summary.victim.slot] = -1;
      if (score) score[offset + summary.victim.slot] = 0;
    } else {
      free[i] = summary.first_empty >= 0 ? summary.first_empty : used(row);
    }
  }
};

// A tensor (batch, heads, time, head_dim) or, for one token, (batch, heads, head_dim), with strides
// in bytes. The elements of head_dim are adjacent.
struct Heads {
  char* data;
  int64_t row, head, time;

  MSRNN_FN char* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * row + h * head + t * time;
  }
};

// A step: one token of every row of a batch is attended for, and if `evicting` the policy drops a
// state of the row that the token uses.
struct TokenStep {
  State state;
  int64_t batch;
  RowIndex rows;
  Policy policy;
  float scale;
  bool evicting;
  int64_t query_heads;
  Heads q, k, v, out;
  float* scores;  // (batch, groups, slots): the attention that each slot got; or null
};

// A sequence of `time` tokens, one after the other. A row skips those that are not valid.
struct TokenSequence {
  int64_t time;
  const bool* valid;  // (batch, time); null: all of them
  int64_t* expiry;    // (batch, groups, time), to be written
  int64_t* times;     // (batch, time): scratch memory, for the time of each position
};

}  // namespace msrnn
