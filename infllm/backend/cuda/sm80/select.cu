// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of a row without sorting: all of a row's scores lie in the registers of its
// threads, as integers of the same order, and the K-th largest is found bit by bit from the top,
// each bit one count over the row. Bits that all scores share are skipped, which leaves at most 16
// of bf16 scores. Then the blocks above it are written in order, and those equal to it from the
// lowest index until the row is full.
//
// A row of up to 2,048 blocks belongs to one warp; longer ones to more warps, each with a
// contiguous piece.
#include <string>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/sm80/select.h"

namespace infllm::cuda::sm80 {
namespace {

constexpr int kMaxWarps = 16;     // of a row
constexpr int kRowsPerBlock = 4;  // where a row is one warp
// Keys of a lane: of short rows, and of long ones.
constexpr int kFewKeys = 16;
constexpr int kManyKeys = 64;

struct SelectArgs {
  Batch batch;
  const float* scores;      // [Hkv, T, N]
  std::int32_t* selection;  // [Hkv, T, K]
  std::int64_t blocks;      // N
  std::int32_t columns;     // K
  int init_blocks;
  int local_blocks;
};

// The sequence that a token of the packed axis belongs to: the last one that starts at or before
// it. All lanes of a warp call it.
__device__ int sequence_of_token(const Batch& batch, int token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int found = -1;
  for (int base = 0; base < batch.num_sequences; base += 32) {
    const int b = base + lane;
    const unsigned before =
        __ballot_sync(0xffffffff, b < batch.num_sequences && batch.query_start[b] <= token);
    found += __popc(before);
    if (before != 0xffffffff) break;
  }
  return found;
}

// Floats as unsigned integers of the same order, all above 0; NaN counts as -inf.
__device__ std::uint32_t ordered(float x) {
  const std::uint32_t bits = __float_as_uint(isnan(x) ? -INFINITY : x + 0.0f);  // -0 becomes 0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

template <int kKeys>
class Row {
 public:
  // `words` is shared memory of the row's warps.
  __device__ Row(std::uint32_t (*words)[2][kMaxWarps], int warp, int warps)
      : words_(words), warp_(warp), warps_(warps), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Scores x[0 .. n).
  __device__ void load(const float* x, int n) {
    first_ = warp_ * 32 * kKeys + lane_;
    used_ = (n - warp_ * 32 * kKeys + 31) / 32;
    for_each([&](int i) { key_[i] = first_ + 32 * i < n ? ordered(x[first_ + 32 * i]) : 0; });
  }

  // Writes the indices, from `base` on, of the k largest in ascending order; 0 < k < n.
  __device__ void take_largest(int k, int base, std::int32_t* out) {
    const std::uint32_t threshold = kth_largest(k);
    std::uint32_t above = 0;
    std::uint32_t equal = 0;
    for_each([&](int i) {
      above += key_[i] > threshold ? 1 : 0;
      equal += key_[i] == threshold ? 1 : 0;
    });
    int above_before = 0;
    int equal_before = 0;
    const int ties = k - count_before(above, equal, above_before, equal_before);
    for_each([&](int i) {
      const unsigned is_above = __ballot_sync(0xffffffff, key_[i] > threshold);
      const unsigned is_equal = __ballot_sync(0xffffffff, key_[i] == threshold);
      const unsigned lanes_before = (1u << lane_) - 1;
      const int ties_before = equal_before + __popc(is_equal & lanes_before);
      if (key_[i] > threshold || (key_[i] == threshold && ties_before < ties)) {
        out[above_before + __popc(is_above & lanes_before) + min(ties_before, ties)] =
            base + first_ + 32 * i;
      }
      above_before += __popc(is_above);
      equal_before += __popc(is_equal);
    });
  }

 private:
  static constexpr int kRun = 8;

  // Calls body(i) for the warp's keys, whole runs at a time: of a row that is shorter than the
  // longest, most runs are empty.
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) {
#pragma unroll
    for (int run = 0; run < kKeys; run += kRun) {
      if (run >= used_) break;
#pragma unroll
      for (int i = run; i < run + kRun; ++i) body(i);
    }
  }

  // The k-th largest key, or any number that separates the k largest from the rest.
  __device__ std::uint32_t kth_largest(int k) {
    std::uint32_t any = 0;
    std::uint32_t all = ~0u;
    for_each([&](int i) {
      any |= key_[i];
      all &= key_[i] != 0 ? key_[i] : ~0u;
    });
    any = __reduce_or_sync(0xffffffff, any);
    all = __reduce_and_sync(0xffffffff, all);
    if (warps_ > 1) {
      share(any, all);
      any = __reduce_or_sync(0xffffffff, lane_ < warps_ ? any : 0);
      all = __reduce_and_sync(0xffffffff, lane_ < warps_ ? all : ~0u);
    }
    std::uint32_t found = all;
    for (std::uint32_t open = any & ~all; open != 0;) {
      const std::uint32_t bit = 0x80000000u >> __clz(static_cast<int>(open));
      open &= ~bit;
      const int count = count_at_least(found | bit);
      if (count >= k) found |= bit;
      if (count == k) break;
    }
    return found;
  }

  __device__ int count_at_least(std::uint32_t threshold) {
    std::uint32_t count = 0;
    for_each([&](int i) { count += key_[i] >= threshold ? 1 : 0; });
    count = __reduce_add_sync(0xffffffff, count);
    if (warps_ == 1) return static_cast<int>(count);
    std::uint32_t unused = 0;
    share(count, unused);
    return static_cast<int>(__reduce_add_sync(0xffffffff, lane_ < warps_ ? count : 0));
  }

  // How many keys are above and equal in the warps before this one; returns how many are above in
  // all.
  __device__ int count_before(std::uint32_t above, std::uint32_t equal, int& above_before,
                              int& equal_before) {
    above = __reduce_add_sync(0xffffffff, above);
    equal = __reduce_add_sync(0xffffffff, equal);
    if (warps_ == 1) return static_cast<int>(above);
    share(above, equal);
    above_before = static_cast<int>(__reduce_add_sync(0xffffffff, lane_ < warp_ ? above : 0));
    equal_before = static_cast<int>(__reduce_add_sync(0xffffffff, lane_ < warp_ ? equal : 0));
    return static_cast<int>(__reduce_add_sync(0xffffffff, lane_ < warps_ ? above : 0));
  }

  // Replaces a warp's two numbers by those of the row's warp number `lane`, where there is one.
  // Rounds take turns with two sets of words, so one barrier a round is enough.
  __device__ void share(std::uint32_t& a, std::uint32_t& b) {
    std::uint32_t(&words)[2][kMaxWarps] = words_[round_];
    round_ ^= 1;
    if (lane_ == 0) {
      words[0][warp_] = a;
      words[1][warp_] = b;
    }
    __syncthreads();
    a = words[0][lane_ % kMaxWarps];
    b = words[1][lane_ % kMaxWarps];
  }

  std::uint32_t (*words_)[2][kMaxWarps];
  int round_ = 0;
  int warp_;
  int warps_;
  int lane_;
  int first_;
  int used_;                  // keys of a lane, rounded up; may be negative
  std::uint32_t key_[kKeys];  // of blocks first_ + 32 i; 0 where there is none
};

// Thread block (32 warps, rows): a row is a (KV head, token).
template <int kKeys>
__global__ void __launch_bounds__(32 * kMaxWarps) select_kernel(SelectArgs a) {
  __shared__ std::uint32_t words[2][2][kMaxWarps];
  const int token = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  if (token >= a.batch.num_tokens) return;
  const Sequence sequence(a.batch, sequence_of_token(a.batch, token));
  if (!sequence.sparse) return;
  const int position = sequence.first_position() + token - sequence.first_token;
  const std::int64_t row = std::int64_t{blockIdx.y} * a.batch.num_tokens + token;
  std::int32_t* out = a.selection + row * a.columns;

  // Forced blocks are known from the position. When the budget is short the local window comes
  // first, nearest first.
  const int own = position / kPageTokens;
  const int first_local = max(max(0, own - a.local_blocks + 1), own + 1 - a.columns);
  const int local = own + 1 - first_local;
  const int sink = min(min(a.init_blocks, first_local), a.columns - local);
  const int candidates = first_local - sink;
  const int dynamic = min(a.columns - local - sink, candidates);
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const bool all = dynamic == candidates;
  for (int i = thread; i < a.columns; i += threads) {
    if (i < sink || (all && i < sink + dynamic)) {
      out[i] = i;
    } else if (i >= sink + dynamic) {
      const int block = first_local + i - sink - dynamic;
      out[i] = block <= own ? block : -1;
    }
  }
  if (all || dynamic == 0) return;
  Row<kKeys> scores(words, thread / 32, threads / 32);
  scores.load(a.scores + row * a.blocks + sink, candidates);
  scores.take_largest(dynamic, sink, out + sink);
}

template <int kKeys>
Status launch(const Device& device, const SelectArgs& args, int heads, int warps) {
  const int rows = warps == 1 ? kRowsPerBlock : 1;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.batch.num_tokens, rows)),
                  static_cast<unsigned>(heads));
  const dim3 block(static_cast<unsigned>(32 * warps), static_cast<unsigned>(rows));
  select_kernel<kKeys><<<grid, block, 0, device.stream>>>(args);
  return launched("select");
}

}  // namespace

Status select(const Backend& backend, const SelectParams& params, std::span<std::byte>) {
  const SelectArgs args{.batch = params.batch,
                        .scores = static_cast<const float*>(params.scores),
                        .selection = params.selection,
                        .blocks = params.blocks(),
                        .columns = params.columns(),
                        .init_blocks = params.config.init_blocks,
                        .local_blocks = params.config.local_blocks()};
  const Device& device = device_of(backend);
  if (args.blocks <= 32 * kFewKeys) return launch<kFewKeys>(device, args, params.heads_kv, 1);
  const std::int64_t warps = ceil_div(args.blocks, 32 * kManyKeys);
  if (warps > kMaxWarps) {
    return unsupported("select: " + std::to_string(args.blocks) +
                       " blocks of a sequence, but this device takes up to " +
                       std::to_string(kMaxWarps * 32 * kManyKeys) + "; shorten the sequence");
  }
  return launch<kManyKeys>(device, args, params.heads_kv, static_cast<int>(warps));
}

}  // namespace infllm::cuda::sm80
