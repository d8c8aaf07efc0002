// The policy alone: the second half of a step, for when ranks or others have a say in the scores.
#include "step_block.h"

namespace msrnn {
namespace gpu {

// What attend_scores leaves for later. A block serves a row of the batch.
struct EvictCall {
  State state;
  RowIndex rows;
  Policy policy;
  const float* scores;
};

__global__ void __launch_bounds__(kStepThreads)
    evict_kernel(const __grid_constant__ EvictCall call) {
  const State& s = call.state;
  const int64_t row = find_row(call.rows, blockIdx.x);
  if (row < 0) return;
  const int64_t used = s.used(row), now = s.seen[row];
  auto* const of_warps = reinterpret_cast<Summary*>(dynamic_shared());
  bool waiting = false;
#pragma unroll 1
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t offset = s.group(row, g) * s.slots, scores = s.group(blockIdx.x, g) * s.slots;
    if (s.position[offset + s.free_slot(row, g)] < 0) continue;  // for all threads alike
    waiting = true;
    Summary summary;
    for (int64_t slot = threadIdx.x; slot < used; slot += kStepThreads) {
      const int64_t position = s.position[offset + slot];
      float score = 0;
      if (position >= 0 && call.policy.score != ScoreKind::position) {
        score = call.scores[scores + slot];
        if (s.score) s.score[offset + slot] = score += s.score[offset + slot];
      }
      summary.look_at(call.policy, slot, position, score, now);
    }
    summary = warp_summary(summary);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = summary;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kStepWarps; ++w) summary.add(of_warps[w]);
      s.evict(row, g, summary);
    }
    __syncthreads();
  }
  if (waiting && threadIdx.x == 0) ++s.seen[row];
}

}  // namespace gpu

const char* launch_evict(const State& state, int64_t batch, const RowIndex& rows,
                         const Policy& policy, const float* scores, void* stream) {
  const auto blocks = static_cast<uint32_t>(batch);
  const cudaError_t error =
      launch(gpu::evict_kernel, blocks, kStepThreads, kStepWarps * sizeof(Summary),
             static_cast<cudaStream_t>(stream), gpu::EvictCall{state, rows, policy, scores});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace msrnn
