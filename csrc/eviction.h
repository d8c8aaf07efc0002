// Which state a bounded memory drops, written once for every backend.
//
// Every policy is a point in one space: how a state is scored, and which states are protected.
//
//   Window    position     -
//   Window+i  position     first i tokens
//   H2O       accumulated  the most recent r tokens, the current one included
//   TOVA      attention    - (or the first i tokens, or the current one: r = 1)
//
// The unprotected state with the lowest score goes, and of equals the oldest. NaN is lower than any
// number. Positions are unique, so the order is total: a minimum taken in any order, by any number
// of threads, is the same state.
#pragma once

#include <cstdint>

#include "inline.h"

namespace msrnn {

enum class ScoreKind : int64_t { position, attention, accumulated };

struct Policy {
  ScoreKind score;
  int64_t sinks;   // protects positions < sinks
  int64_t recent;  // protects positions > now - recent
};

MSRNN_FN bool is_protected(const Policy& policy, int64_t position, int64_t now) {
  return position < policy.sinks || position > now - policy.recent;
}

struct Candidate {
  float score;  // 0 where the policy scores by position
  int64_t position;
  int64_t slot;  // -1: none
};

MSRNN_FN bool goes_before(const Candidate& a, const Candidate& b) {
  if (b.slot < 0) return a.slot >= 0;
  if (a.slot < 0) return false;
  const bool a_is_nan = a.score != a.score, b_is_nan = b.score != b.score;
  if (a_is_nan != b_is_nan) return a_is_nan;
  if (!a_is_nan && a.score != b.score) return a.score < b.score;
  return a.position < b.position;
}

// What we know of some slots of one row and group. Summaries may be added in any order.
struct Summary {
  Candidate victim{__builtin_inff(), 0, -1};
  int64_t occupied = 0;
  int64_t first_empty = -1;

  MSRNN_FN void add(const Summary& other) {
    if (goes_before(other.victim, victim)) victim = other.victim;
    occupied += other.occupied;
    const auto mine = static_cast<uint64_t>(first_empty);  // -1, none, is then more than any
    if (static_cast<uint64_t>(other.first_empty) < mine) first_empty = other.first_empty;
  }
  // Takes in a slot by its position and its score.
  MSRNN_FN void look_at(const Policy& policy, int64_t slot, int64_t position, float score,
                        int64_t now) {
    if (position < 0) {
      if (first_empty < 0) first_empty = slot;
      return;
    }
    ++occupied;
    if (score > victim.score || is_protected(policy, position, now)) return;
    const Candidate candidate{score, position, slot};
    if (goes_before(candidate, victim)) victim = candidate;
  }
};

}  // namespace msrnn
