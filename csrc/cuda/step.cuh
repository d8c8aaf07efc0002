// The step kernel: a token of every row is stored and attended for, states are scored, and one is
// evicted.
//
// Level 0, warp. A warp multiplies some rows of one key-value head with several of its query heads,
//   on the units that the GPU has for the dtype: tensor cores (step_mma.h) or multiply-adds
//   (step_fma.h).
// Level 1, block. A block has a range of slots of one row, for all heads. Its logits, and then its
//   weights, stay in shared memory: the score of a slot is made of them once the sums of all blocks
//   are known.
// Level 2, row. The blocks of a row publish maximum, sum and partial output of every query head and
//   wait for each other. Each then combines its own slice of the output, in the order of the
//   blocks, finishes the scores of its own slots, and publishes its candidate for eviction. The
//   last one picks the victim, for which nobody waits, since the launch ends.
// Level 3, batch. A row of the batch uses its own row of the state, or the one that an index names.
//   Rows come in any order. A sequence repeats all this for every token in the same launch, and
//   there the blocks of a row do wait for the victim.
//
// Why it cannot dead-lock. A grid that fits the device as a whole is launched as a cooperative one,
// so that all of its blocks become resident, or none. In a larger grid, a row may take a quarter of
// the device, and blocks take tickets in the order in which they start, those of a row one after
// the other. Consider the first row that is not done. Blocks of later rows hold later tickets. So
// while one of its blocks has not started, only blocks of that row are resident, which are fewer
// than fit even beside three other such grids, and one more starts. A row that is larger takes two
// launches, which do the same work with the same bits: between them the weights lie in memory, 4
// bytes for each query head and slot, and no block waits for a later ticket. All this relies on the
// stream having the multiprocessors that the device reports, which it has not in a green context.
//
// Order. Sums over head_dim, slots, blocks and heads run in an order that the plan fixes, and a
// minimum over unique positions needs none. So every run gives the same bits. (How tensor cores
// round the sum of 16 products is up to the architecture.)
//
// Memory. Keys and values are read once, 16 bytes at a time. If a key-value head has more than 8
// query heads (4 in float32), the others find them in cache. The exchange goes through L2. Each
// block writes a partial output, which is read once: with 32 query heads over 8 of 128 in bfloat16
// that is 6 % of the bytes of 129 slots and 13 % of those of 63. Each block of a row also reads the
// sums of all of them.
//
// Latency. Between the reading of values and the end, a token passes two exchanges through L2. So
// what follows an exchange is spread over all threads, with loads that do not depend on each other:
// eight lanes for each head of the softmax, warps times blocks for its totals, and four elements of
// the output for each thread. With a warp for each head and an element for each thread, these took
// 4, 8 and up to 32 such round trips, one after the other. One token needs no memset, which would
// be a node of its own in a graph.
#pragma once

#include <atomic>
#include <type_traits>

#include "step_fma.h"
#include "step_mma.h"

namespace msrnn {
namespace gpu {

MSRNN_FN void round_to(float* to, float x) { *to = x; }
template <class Narrow>
MSRNN_FN void round_to(Narrow* to, float x) {
  to->bits = static_cast<uint16_t>(two_halves(Narrow{}, x, 0));
}

// One block at work, on tensors of T.
template <class T, class Products>
struct Step : StepBlock {
  MSRNN_FN explicit Step(const StepCall& c) : StepBlock(c) {}

  // From logits to weights against the block's own maximum. Their sum goes to the row. Eight lanes
  // share a head.
  MSRNN_FN void exponentiate(int slots) const {
    const int place = lane() % 8;
#pragma unroll 1
    for (int first = 0; first < heads(); first += kStepThreads / 8) {
      const int mine = first + threadIdx.x / 8, head = mine < heads() ? mine : 0;
      const int count = mine < heads() ? slots : 0;
      const int g = static_cast<int>(s.group_of(head / sharing()));
      float* const w = weights(head);
      float largest = negative_infinity(), sum = 0;
#pragma unroll 4
      for (int i = place; i < count; i += 8) {
        if (is_occupied(g, i)) largest = larger_of(largest, w[i]);
      }
#pragma unroll
      for (int apart = 4; apart > 0; apart /= 2) {
        largest = larger_of(largest, __shfl_xor_sync(~0u, largest, apart));
      }
#pragma unroll 4
      for (int i = place; count > 0 && i < padded_slots(); i += 8) {
        const bool there = i < count && is_occupied(g, i);
        w[i] = there ? rescale(w[i], largest) : 0;
        sum += w[i];
      }
#pragma unroll
      for (int apart = 4; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      if (place > 0 || count == 0) continue;
      maxima()[head] = largest;
      call.exchange.sums[share(split, heads()) + head] = {largest, sum};
    }
  }

  MSRNN_FN Flag token_of(int t) const { return call.token + (t - call.first); }
  // Waits for blocks [0, count) of this row.
  MSRNN_FN void await(const Flag* flags, int count, Flag token) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kStepThreads) {
      while (load_acquire(flags + i) != token) spin_pause();
    }
    __syncthreads();
  }
  // After everything that this block has written.
  MSRNN_FN void tell(Flag* flag, Flag token) const {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, token);
  }

  // The softmax over the row: for every query head its maximum and 1 / its sum. Warps share out the
  // blocks, and lanes the heads.
  MSRNN_FN void find_totals(int active) const {
    auto* const of_warps = reinterpret_cast<LogitSum*>(staging());
#pragma unroll 1
    for (int first = 0; first < heads(); first += 32) {
      const int head = first + lane();
      LogitSum total{negative_infinity(), 0};
      if (head < heads()) {
        const LogitSum* const sums = call.exchange.sums + share(0, heads()) + head;
#pragma unroll 4
        for (int i = warp(); i < active; i += kStepWarps) {
          add(total, load_coherent_sum(sums + i * heads()));
        }
      }
      of_warps[threadIdx.x] = total;
      __syncthreads();
      if (warp() == 0 && head < heads()) {
#pragma unroll
        for (int w = 1; w < kStepWarps; ++w) add(total, of_warps[32 * w + lane()]);
        totals()[head] = total.largest;
        factors()[head] = 1 / total.sum;
        maxima()[head] = rescale(maxima()[head], total.largest) / total.sum;
      }
      __syncthreads();
    }
  }
  static MSRNN_FN LogitSum load_coherent_sum(const LogitSum* p) {
    const auto bits = load_coherent(reinterpret_cast<const unsigned long long*>(p));
    LogitSum sum;
    memcpy(&sum, &bits, sizeof sum);
    return sum;
  }
  static MSRNN_FN void add(LogitSum& total, const LogitSum& x) {
    const float largest = larger_of(total.largest, x.largest);
    total.sum =
        fmaf(total.sum, rescale(total.largest, largest), x.sum * rescale(x.largest, largest));
    total.largest = largest;
  }

  // This block's slice of the output, from the partial outputs of all blocks in order, 4 elements
  // for each thread. Where the slice is short, threads share out the blocks.
  MSRNN_FN void combine_outputs(int t, int active) const {
    const int size = heads() * head_dim() / 4, slice = (size + active - 1) / active;
    const int from = split * slice, to = from + slice < size ? from + slice : size;
    const float* const parts = call.exchange.parts + share(0, 4 * size);
    const LogitSum* const sums = call.exchange.sums + share(0, heads());
    int width = 4;
    while (width < slice && width < kStepThreads) width *= 2;
    const int sharing = kStepThreads / width, part = threadIdx.x / width;
    auto* const of_threads = reinterpret_cast<Chunk*>(staging());
#pragma unroll 1
    for (int first = from; first < to; first += width) {
      const int i = first + threadIdx.x % width, head = 4 * i / head_dim();
      Number<float> sum[4] = {};
      if (i < to) {
        const float largest = totals()[head];
#pragma unroll 4
        for (int p = part; p < active; p += sharing) {
          const float factor = rescale(load_coherent(&sums[p * heads() + head].largest), largest);
          add(sum, load_coherent_chunk(parts + 4 * (static_cast<int64_t>(p) * size + i)), factor);
        }
      }
      of_threads[threadIdx.x] = Stored<float>::pack(sum);
      __syncthreads();
      if (part == 0 && i < to) {
#pragma unroll 4
        for (int p = 1; p < sharing; ++p)
          add(sum, chunk_at(of_threads + p * width + threadIdx.x), 1);
        T* const out = reinterpret_cast<T*>(call.out.at(batch_row, head, t)) + 4 * i % head_dim();
#pragma unroll
        for (int j = 0; j < 4; ++j) round_to(out + j, sum[j].v * factors()[head]);
      }
      __syncthreads();
    }
  }
  static MSRNN_FN void add(Number<float> (&sum)[4], const Chunk& chunk, float factor) {
    Number<float> x[4];
    Stored<float>::unpack(chunk, x);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j].v = fmaf(x[j].v, factor, sum[j].v);
  }

  // The attention that each slot of this block got, summed over the query heads of its group. It
  // takes the place of the group's first weights.
  MSRNN_FN void add_heads(int count) const {
    const int groups = static_cast<int>(s.groups), each = heads() / groups;
#pragma unroll 1
    for (int i = threadIdx.x; i < groups * count; i += kStepThreads) {
      const int g = i / count, slot = i % count;
      float sum = 0;
#pragma unroll 8
      for (int head = g * each; head < (g + 1) * each; ++head) {
        sum = fmaf(weights(head)[slot], maxima()[head], sum);
      }
      weights(g * each)[slot] = sum;
    }
  }

  // Scores this block's slots and publishes to the row what it would evict of them.
  MSRNN_FN void summarize(int count) const {
    const int groups = static_cast<int>(s.groups), each = heads() / groups;
    const int64_t now = s.seen[row];
#pragma unroll 1
    for (int g = warp(); g < groups; g += kStepWarps) {
      const int64_t offset = s.group(row, g) * s.slots + begin();
      const int64_t scores = s.group(batch_row, g) * s.slots + begin();
      Summary summary;
#pragma unroll 1
      for (int i = lane(); i < count; i += 32) {
        const bool there = is_occupied(g, i);
        const float sum = weights(g * each)[i];
        if (call.scores) call.scores[scores + i] = there ? sum : 0;
        if (!call.evicting) continue;
        float score = 0;
        if (there && call.policy.score == ScoreKind::attention) score = sum;
        if (there && call.policy.score == ScoreKind::accumulated) {
          score = s.score[offset + i] + sum;
          s.score[offset + i] = score;
        }
        summary.look_at(call.policy, begin() + i, there ? s.position[offset + i] : -1, score, now);
      }
      if (!call.evicting) continue;
      summary = warp_summary(summary);
      if (lane() == 0) call.exchange.summaries[share(split, groups) + g] = summary;
    }
  }

  // In the last block of a row: what the row evicts.
  MSRNN_FN void evict(int t) const {
    const int active = blocks_of(static_cast<int>(s.used(row)));
    const int groups = static_cast<int>(s.groups);
#pragma unroll 1
    for (int g = warp(); g < groups; g += kStepWarps) {
      Summary summary;
#pragma unroll 1
      for (int i = lane(); i < active; i += 32) {
        summary.add(call.exchange.summaries[share(i, groups) + g]);
      }
      summary = warp_summary(summary);
      if (lane() > 0) continue;
      s.evict(row, g, summary);
      const int64_t evicted = s.last_evicted[s.group(row, g)];
      if (!call.expiry) continue;
      int64_t* const expiry = call.expiry + s.group(row, g) * call.time;
      expiry[t] = call.time;
      if (evicted >= 0) {
        const bool own = evicted == s.seen[row];
        expiry[own ? t : call.times[row * call.time + evicted]] = t + 1;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (call.times) call.times[row * call.time + s.seen[row]] = t;
      ++s.seen[row];
    }
  }

  // Blocks that have a slot in use.
  MSRNN_FN int blocks_of(int used) const { return (used + block_slots() - 1) / block_slots(); }

  MSRNN_FN void run_token(int t) {
    const StepExchange& exchange = call.exchange;
    const int used = static_cast<int>(s.used(row)), active = blocks_of(used);
    if (split < active) {
      const int rest = used - begin(), count = rest < block_slots() ? rest : block_slots();
      if (call.attends) {
        attend(t, count);
        if (!call.finishes) return pass_weights(true);
        tell(exchange.attended + share(split, 1), token_of(t));
        await(exchange.attended + share(0, 1), active, token_of(t));
      } else {
        mark_occupied(count);
        pass_weights(false);
        __syncthreads();
      }
      finish(t, count, active);
    }
    if (!call.finishes) return;
    const Flag token = token_of(t);
    const bool last = t == call.last - 1, alone = call.last - call.first == 1;
    if (split < splits() - 1) {
      tell(exchange.decided + share(split, 1), token);
    } else {  // once nobody reads the row's marks and flags any more
      __syncthreads();
      await(exchange.decided + share(0, 1), splits() - 1, token);
      if (call.evicting) evict(t);
      if (!last) tell(exchange.finished + batch_row, token);
    }
    if (!last) return await(exchange.finished + batch_row, 1, token);
    if (!alone || split < splits() - 1) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < splits(); i += kStepThreads) {
      exchange.attended[share(i, 1)] = exchange.decided[share(i, 1)] = 0;
    }
  }
  MSRNN_FN void attend(int t, int count) const {
    store_token(t, count);
    __syncthreads();
    mark_occupied(count);
    Products(*this).multiply_keys(t, count);
    __syncthreads();
    exponentiate(count);
    __syncthreads();
    Products(*this).add_values(count);
  }
  MSRNN_FN void finish(int t, int count, int active) const {
    find_totals(active);
    combine_outputs(t, active);
    if (call.scores || call.policy.score != ScoreKind::position) add_heads(count);
    __syncthreads();
    if (call.scores || call.evicting) summarize(count);
  }

  // Writes the weights to memory, or reads them and their maxima, between two launches.
  MSRNN_FN void pass_weights(bool out) const {
    float* const memory = call.exchange.weights + share(split, heads()) * padded_slots();
#pragma unroll 1
    for (int i = threadIdx.x; i < heads() * padded_slots(); i += kStepThreads) {
      if (out) {
        memory[i] = weights(0)[i];
      } else {
        weights(0)[i] = memory[i];
      }
    }
    if (out) return;
#pragma unroll 1
    for (int head = threadIdx.x; head < heads(); head += kStepThreads) {
      maxima()[head] = call.exchange.sums[share(split, heads()) + head].largest;
    }
  }

  // Of a row of the batch that does nothing. Its blocks share out the heads.
  MSRNN_FN void clear_output() const {
    if (!call.finishes) return;
#pragma unroll 1
    for (int head = split; head < heads(); head += splits()) {
      T* const out = reinterpret_cast<T*>(call.out.at(batch_row, head, call.first));
      for (int i = threadIdx.x; i < head_dim(); i += kStepThreads) round_to(out + i, 0);
    }
  }

  MSRNN_FN void run() {
    uint32_t index = blockIdx.x;
    if (call.ticketed) {
      uint32_t* const ticket = in_shared<uint32_t>(call.shared.ticket);
      if (threadIdx.x == 0) *ticket = atomicAdd(call.exchange.ticket, 1u);
      __syncthreads();
      index = *ticket;
    }
    batch_row = static_cast<int>(index / splits());
    split = static_cast<int>(index % splits());
    row = static_cast<int>(find_row(call.rows, batch_row));
    if (row < 0) return clear_output();
#pragma unroll 1
    for (int t = call.first; t < call.last; ++t) {
      if (!call.valid || call.valid[row * call.time + t]) {
        run_token(t);
      } else if (split == 0) {
        for (int g = threadIdx.x; g < s.groups; g += kStepThreads) {
          call.expiry[s.group(row, g) * call.time + t] = t;
        }
      }
    }
  }
};

template <class T, int chunks>
__global__ void __launch_bounds__(kStepThreads, 2)
    step_kernel(const __grid_constant__ StepCall call) {
  constexpr bool mma = kTensorCores && sizeof(T) == 2;
  using Products = std::conditional_t<mma, MmaProducts<T>, FmaProducts<T, chunks>>;
  Step<T, Products>(call).run();
}

// Calls `with` for the kernel of a call: what both functions below share.
template <class T, class With>
cudaError_t with_step_kernel(StepCall& call, const With& with) {
  const auto of = [&]<int chunks>(std::integral_constant<int, chunks>) {
    call.shared = lay_out_shared(call);
    call.sharing = static_cast<int32_t>(call.query_heads / call.state.kv_heads);
    const auto bytes = static_cast<size_t>(call.shared.bytes);
    if (auto e = allow_shared(step_kernel<T, chunks>, bytes)) return e;
    return with(step_kernel<T, chunks>, bytes);
  };
  constexpr int64_t kOnePiece = 32 * sizeof(Chunk) / sizeof(T);  // elements of a row
  if constexpr (kLargestHeadDim > kOnePiece) {
    if (call.state.head_dim > kOnePiece) return of(std::integral_constant<int, 2>{});
  }
  return of(std::integral_constant<int, 1>{});
}

// Whether the blocks of a row can all be resident. This and the launch are compiled once for each
// dtype, in instantiations/step_<dtype>.cu.
template <class T>
cudaError_t step_fits_of(StepCall call, Fits* fits) {
  return with_step_kernel<T>(call, [&](auto kernel, size_t shared) {
    int most = 0;
    const cudaError_t error = resident_blocks(&most, kernel, kStepThreads, shared);
    *fits = call.batch * call.plan.splits <= most ? Fits::whole
            : 4 * call.plan.splits <= most        ? Fits::by_rows
                                                  : Fits::not_at_all;
    return error;
  });
}

// The first of `count` neighbouring numbers that no launch has had.
inline Flag new_tokens(int64_t count) {
  static std::atomic<Flag> next{0x9E3779B97F4A7C15};
  return next.fetch_add(static_cast<Flag>(count));
}

template <class T>
cudaError_t launch_step_of(StepCall call, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(call.batch * call.plan.splits);
  const auto flags = reinterpret_cast<char*>(call.exchange.summaries) -
                     reinterpret_cast<char*>(call.exchange.ticket);
  return with_step_kernel<T>(call, [&](auto kernel, size_t shared) {
    const auto launch_half = [&](bool attends, bool finishes, int64_t first, int64_t last) {
      call.attends = attends;
      call.finishes = finishes;
      call.first = first;
      call.last = last;
      if (call.token == 0) call.token = new_tokens(last - first);
      const bool together = call.plan.one_launch && call.fits == Fits::whole;
      call.ticketed = !together;
      if (call.ticketed || last - first > 1) {
        if (auto e = cudaMemsetAsync(call.exchange.ticket, 0, flags, stream)) return e;
      }
      return launch(kernel, blocks, kStepThreads, shared, stream, call, together);
    };
    const int64_t first = call.first, last = call.last;
    if (call.plan.one_launch) return launch_half(true, true, first, last);
    for (int64_t t = first; t < last; ++t) {
      if (auto e = launch_half(true, false, t, t + 1)) return e;
      if (auto e = launch_half(false, true, t, t + 1)) return e;
    }
    return cudaSuccess;
  });
}

}  // namespace gpu
}  // namespace msrnn
