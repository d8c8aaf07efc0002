// The host side of the scans on the CPU: checks, the plan (tiles and threads), and the choice of an
// instruction set. scan_kernel.h has the kernels.
#include "scan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../scan_ops.h"
#include "runtime.h"

namespace msrnn {
namespace {

// With fewer channels in flight than this, time is cut into tiles of about kTileElements elements.
// Both depend on shape alone, so that results do not depend on the number of threads.
constexpr int64_t kEnoughChannels = 1024;
constexpr int64_t kTileElements = 16384;
// The widest block of channels that one thread walks keeps its carries in L1. The narrowest has two
// cache lines.
constexpr int64_t kWidestBlock = 1024;
constexpr int64_t kNarrowestBlock = 32;
// A thread is worth waking for this many elements.
constexpr int64_t kElementsPerThread = 16384;
// From these sizes on, outputs are written past the cache, and we ask for huge pages.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
constexpr int64_t kLargeBytes = int64_t{8} << 20;

ScanKernels kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (dtype != DType::float64) {
    if (capability() >= Capability::avx512) return scan_kernels_avx512(dtype);
    if (capability() >= Capability::avx2) return scan_kernels_avx2(dtype);
  }
#endif
  return scan_kernels_baseline(dtype);
}

// Touches the pages of a large output before the kernel does. The operating system zeroes a page
// while the thread that wants it waits: the first touch of 64 MB costs 30 ms in pages of 4 KB, 10
// ms in huge ones, and half of that when all threads share it.
void prepare_output(const Tensor& x, int64_t bytes) {
  if (bytes < kLargeBytes) return;
  const HugePages pages = prefer_huge_pages(x.data_ptr(), bytes);
  if (pages.count == 0) return;
  torch::stable::parallel_for(0, pages.count, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) *reinterpret_cast<volatile char*>(pages.first + i * HugePages::kSize) = 0;
  });
}

// The sequences of a call, cut where resets are set, and the steps that they cover.
struct Segments {
  std::vector<Segment> pieces;
  int64_t sequences;
  int64_t begin, end;  // of packed sequences; otherwise all of time
};

// One sequence as pieces. A reset of its first step cuts a piece without steps off, which takes the
// initial state and leads nowhere.
void cut(Segments& all, const OptionalTensor& resets, Segment whole, bool reverse) {
  const auto first = static_cast<std::ptrdiff_t>(all.pieces.size());
  if (resets && whole.length > 0) {
    const auto* at = memory_of<const bool>(*resets) + whole.row * resets->stride(0);
    const int64_t end = whole.start + whole.length;
    int64_t begin = whole.start;
    for (int64_t t = begin + (reverse ? 1 : 0); t < end; ++t) {
      if (!at[t * resets->stride(1)]) continue;
      all.pieces.push_back({whole.row, begin, t - begin, whole.sequence, false, false});
      begin = t;
    }
    whole.start = begin;
    whole.length = end - begin;
  }
  all.pieces.push_back(whole);
  (reverse ? all.pieces.back() : all.pieces[first]).enters = true;
  (reverse ? all.pieces[first] : all.pieces.back()).leaves = true;
}

Segments segments_of(const Shape& shape, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& resets, bool reverse) {
  if (resets) {
    STD_TORCH_CHECK(resets->dim() == 2 && resets->size(0) == shape.rows &&
                        resets->size(1) == shape.time && resets->scalar_type() == ScalarType::Bool,
                    "expected resets (B, T) of bool");
  }
  Segments all{{}, shape.rows, 0, shape.time};
  if (!cu_seqlens) {
    all.pieces.reserve(shape.rows);
    for (int64_t b = 0; b < shape.rows; ++b) {
      cut(all, resets, {b, 0, shape.time, b, false, false}, reverse);
    }
    return all;
  }
  const Tensor& cu = *cu_seqlens;
  STD_TORCH_CHECK(shape.rows == 1, "cu_seqlens needs B = 1");
  STD_TORCH_CHECK(cu.dim() == 1 && cu.size(0) >= 1, "expected cu_seqlens of shape (N + 1,)");
  const bool wide = cu.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || cu.scalar_type() == ScalarType::Int,
                  "expected int32 or int64 cu_seqlens");
  const auto* data = memory_of<const char>(cu);
  auto value = [&](int64_t i) -> int64_t {
    const char* p = data + i * cu.stride(0) * (wide ? 8 : 4);
    return wide ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  };
  all.sequences = cu.size(0) - 1;
  all.begin = all.end = value(0);
  for (int64_t n = 0; n < cu.size(0); ++n) {
    const int64_t end = value(n);
    STD_TORCH_CHECK(all.end <= end && 0 <= end && end <= shape.time,
                    "scan: expected cu_seqlens from 0 to T = ", shape.time,
                    ", not to decrease, got ", end, " at index ", n);
    if (n) cut(all, resets, {0, all.end, end - all.end, n - 1, false, false}, reverse);
    all.end = end;
  }
  return all;
}

// Zeros at the steps of a packed output that no sequence covers.
void clear_uncovered(const View& v, const Segments& segments, int64_t time, int64_t bytes) {
  for (int64_t t = 0; t < segments.begin; ++t) std::memset(v.data + t * v.time, 0, bytes);
  for (int64_t t = segments.end; t < time; ++t) std::memset(v.data + t * v.time, 0, bytes);
}

// The tiles of a call, the carries between them, and a flag for each carry.
struct Plan {
  std::vector<Tile> tiles;
  std::vector<double> carries;  // room for float or double
  std::unique_ptr<uint32_t[]> posted;
  int64_t threads;
};

int64_t tile_rows(const std::vector<Segment>& segments, int64_t channels) {
  int64_t total = 0, longest = 0;
  for (const Segment& g : segments) {
    total += g.length;
    longest = std::max(longest, g.length);
  }
  if (longest == 0 || channels == 0 || total * channels >= kEnoughChannels * longest)
    return longest;
  return std::max<int64_t>(16, kTileElements / padded(channels));
}

// `before` and `after` are the states that enter and leave each sequence on this walk, or null.
Plan make_plan(const std::vector<Segment>& segments, int64_t channels, DType dtype,
               const void* before, void* after, bool backward) {
  Plan plan;
  const int64_t scalar = dtype == DType::float64 ? 8 : 4;
  const int64_t rows = std::max<int64_t>(1, tile_rows(segments, channels));
  int64_t elements = 0, chained = 0, pieces = 0;
  for (const Segment& g : segments) {
    elements += g.length * channels;
    const int64_t n = std::max<int64_t>(1, (g.length + rows - 1) / rows);
    pieces += n;
    chained += n - 1;
  }
  plan.threads =
      std::clamp<int64_t>(elements / kElementsPerThread, 1, torch::stable::get_num_threads());

  // Blocks of channels only share out the work. They change no bit.
  int64_t blocks = (channels + kWidestBlock - 1) / kWidestBlock;
  while (chained == 0 && pieces * blocks % plan.threads &&
         channels / (blocks + 1) >= kNarrowestBlock) {
    ++blocks;
  }
  const int64_t width = blocks ? padded((channels + blocks - 1) / blocks) : 0;

  plan.carries.resize((chained * channels * scalar + 7) / 8);
  plan.posted = std::make_unique<uint32_t[]>(chained * std::max<int64_t>(blocks, 1));
  plan.tiles.reserve(pieces * blocks);
  auto* carry = reinterpret_cast<char*>(plan.carries.data());
  uint32_t* flag = plan.posted.get();
  for (size_t i = 0; i < segments.size(); ++i) {
    const int64_t offset = segments[i].sequence * channels * scalar;
    const bool enters = backward ? segments[i].leaves : segments[i].enters;
    const bool leaves = backward ? segments[i].enters : segments[i].leaves;
    const void* entering = before && enters ? static_cast<const char*>(before) + offset : nullptr;
    for (int64_t first = 0; first == 0 || first < segments[i].length; first += rows) {
      const bool last = first + rows >= segments[i].length;
      void* leaving = carry;
      if (last) leaving = after && leaves ? static_cast<char*>(after) + offset : nullptr;
      for (int64_t c = 0; c < channels; c += width) {
        Tile t{};
        t.segment = static_cast<int64_t>(i);
        t.first = first;
        t.rows = std::min(rows, segments[i].length - first);
        t.channel_begin = c;
        t.channel_end = std::min(channels, c + width);
        t.before = entering;
        t.after = leaving;
        t.wait = first ? flag - blocks : nullptr;
        t.post = last ? nullptr : flag++;
        plan.tiles.push_back(t);
      }
      entering = leaving;
      if (!last) carry += channels * scalar;
    }
  }
  return plan;
}

// Tiles are taken in order, so that whoever waits for a carry waits for a tile that somebody works
// on. No number of threads and no scheduling can dead-lock.
void run(const Scan& scan, TileFunction kernel, const Plan& plan) {
  int64_t scratch = 0;
  for (const Tile& t : plan.tiles) scratch = std::max(scratch, scratch_scalars(t));
  std::atomic<size_t> ticket{0};
  auto work = [&](int64_t, int64_t) {
    FlushDenormals flush(scan.dtype != DType::float64);
    constexpr std::align_val_t kLine{64};
    void* memory = ::operator new(scratch * 8, kLine);
    for (size_t i; (i = ticket.fetch_add(1)) < plan.tiles.size();) {
      kernel(scan, plan.tiles[i], memory);
    }
    if (scan.stream) store_fence();
    ::operator delete(memory, kLine);
  };
  const int64_t threads = std::min<int64_t>(plan.threads, plan.tiles.size());
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

bool is_packed(const View& v, DType dtype) { return !v.data || v.channel == size_of(dtype); }

// Whether every vector of the outputs is aligned for non-temporal stores.
bool can_stream(const View& v) {
  return (reinterpret_cast<uintptr_t>(v.data) | v.row | v.time) % 64 == 0;
}

Scan describe(ScanOp op, const Inputs& in, const std::vector<Segment>& segments, bool reverse) {
  Scan s{};
  s.op = op;
  s.dtype = in.dtype;
  s.reverse = reverse;
  s.channels = in.shape.channels;
  s.segments = segments.data();
  s.packed = true;
  for (int i = 0; i < in.count; ++i) {
    s.input[i] = in.view[i];
    s.packed = s.packed && is_packed(in.view[i], in.dtype);
  }
  return s;
}

struct Cpu {
  static std::tuple<Tensor, Tensor> forward(ScanOp op, const Inputs& in, const Tensor& like,
                                            OptionalTensor h0, const OptionalTensor& cu_seqlens,
                                            const OptionalTensor& resets, bool reverse) {
    const auto [rows, time, channels] = in.shape;
    const Segments segments = segments_of(in.shape, cu_seqlens, resets, reverse);
    const int64_t count = segments.sequences;
    const ScalarType carry = accumulation_type(in.dtype);
    check_state(h0, count, channels, carry);

    Tensor h = allocate(like, {rows, time, channels});
    Tensor last = allocate(like, {count, channels}, carry);
    const int64_t bytes = rows * time * channels * size_of(in.dtype);
    prepare_output(h, bytes);

    Scan s = describe(op, in, segments.pieces, reverse);
    s.state = view_of(h);
    s.stream = bytes >= kStreamBytes && can_stream(s.state);
    clear_uncovered(s.state, segments, time, channels * size_of(in.dtype));
    run(s, kernels_for(in.dtype).forward,
        make_plan(segments.pieces, channels, in.dtype, state_data(h0), last.data_ptr(), false));
    return {h, last};
  }

  // Fills the gradients of the inputs, which view `gradients`, and returns that of h0.
  static Tensor backward(ScanOp op, const Inputs& in, const Inputs& gradients, const Tensor& h,
                         OptionalTensor grad_h, OptionalTensor grad_last, OptionalTensor h0,
                         const OptionalTensor& cu_seqlens, const OptionalTensor& resets,
                         bool reverse) {
    const auto [rows, time, channels] = in.shape;
    const Segments segments = segments_of(in.shape, cu_seqlens, resets, reverse);
    const int64_t count = segments.sequences;
    const ScalarType carry = accumulation_type(in.dtype);
    check_state(h0, count, channels, carry);
    check_state(grad_last, count, channels, carry);
    const View states = view_of_states(h, in);
    Tensor grad_h0 = allocate(h, {count, channels}, carry);
    Scan s = describe(op, in, segments.pieces, reverse);
    s.state = states;
    s.packed = s.packed && is_packed(s.state, s.dtype);
    s.grad_state = view_of_gradient(grad_h, h);
    s.packed = s.packed && is_packed(s.grad_state, s.dtype);
    s.stream = rows * time * channels * size_of(in.dtype) >= kStreamBytes;
    for (int i = 0; i < gradients.count; ++i) {
      s.grad_input[i] = gradients.view[i];
      clear_uncovered(s.grad_input[i], segments, time, channels * size_of(in.dtype));
      s.stream = s.stream && can_stream(s.grad_input[i]);
    }
    s.h0 = state_data(h0);
    run(s, kernels_for(in.dtype).backward,
        make_plan(segments.pieces, channels, in.dtype, state_data(grad_last), grad_h0.data_ptr(),
                  true));
    return grad_h0;
  }

  // A tile for every row in use, from its state and back to it.
  static void step(const RowStep& step, const Tensor& like) {
    const int64_t scalar = step.dtype == DType::float64 ? 8 : 4, bytes = step.channels * scalar;
    Tensor h = allocate(like, {step.batch, 1, step.channels});
    Inputs in{{step.batch, 1, step.channels}, step.dtype, {}, 3};
    std::copy_n(step.input, 3, in.view);
    std::vector<Segment> segments;
    Plan plan;
    for (int64_t b = 0; b < step.batch; ++b) {
      const int64_t row = step.rows.of(b);
      if (row < 0) {
        std::memset(step.out + b * bytes, 0, bytes);
        continue;
      }
      Tile t{};
      t.segment = static_cast<int64_t>(segments.size());
      t.rows = 1;
      t.channel_end = step.channels;
      t.before = step.state + row * step.state_row;
      t.after = step.out + b * bytes;
      segments.push_back({b, 0, 1, row, true, true});
      plan.tiles.push_back(t);
    }
    const auto used = static_cast<int64_t>(segments.size());
    plan.threads = std::clamp<int64_t>(used * step.channels / kElementsPerThread, 1,
                                       torch::stable::get_num_threads());
    Scan s = describe(step.op, in, segments, false);
    s.state = view_of(h);
    run(s, kernels_for(step.dtype).forward, plan);
    for (const Segment& g : segments) {
      std::memcpy(step.state + g.sequence * step.state_row, step.out + g.row * bytes, bytes);
    }
  }

  static Tensor new_like(const Tensor& x) {
    Tensor out = allocate(x, x.sizes());
    prepare_output(out, out.numel() * size_of(dtype_of(out)));
    return out;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, CPU, m) { register_scans<Cpu>(m); }

}  // namespace msrnn
