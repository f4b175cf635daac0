// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/backward/choosers.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm80/token_tile.cuh"

namespace infllm::cuda::backward {
namespace {

constexpr int kThreads = 128;
constexpr int kPlanThreads = 1024;
constexpr int kWindow = 8192;        // blocks that are counted in shared memory at once
constexpr int kSegmentTokens = 256;  // at least
constexpr int kMaxSegments = 512;    // about: what the running counts cost
constexpr int kLeastPartTokens = 2048;
constexpr int kParts = 2048;  // of equal length that all lists together would make

struct ChooserArgs {
  Batch batch;
  const std::int32_t* selection;  // [Hkv, T, columns]
  std::int32_t columns;
  Choosers c;
};

// Calls visit(token, block) for all choices of a segment, thread after column, in blocks first ..
// first + kWindow - 1; with `in_order`, tokens one after another.
template <bool kInOrder, typename Visit>
__device__ void for_each_choice(const ChooserArgs& a, const sm80::TokenTile& tile, int head,
                                int first, Visit&& visit) {
  const std::int32_t* rows =
      a.selection + (std::int64_t{head} * a.batch.num_tokens + tile.token) * a.columns;
  const auto take = [&](int token, int column) {
    const int block = rows[std::int64_t{token} * a.columns + column];
    if (block < first || block >= first + kWindow) return;
    if (block <= (tile.first + token) / kPageTokens) visit(tile.token + token, block - first);
  };
  if constexpr (kInOrder) {
    for (int token = 0; token < tile.tokens; ++token) {
      for (int j = static_cast<int>(threadIdx.x); j < a.columns; j += kThreads) take(token, j);
      __syncthreads();
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < tile.tokens * a.columns; i += kThreads) {
      take(i / a.columns, i % a.columns);
    }
  }
}

__device__ bool has_lists(const ChooserArgs& a, int sequence) {
  return a.c.tokens != nullptr && a.batch.sparse[sequence] != 0;
}

// Block (x, y): segment x, KV head y.
__global__ void __launch_bounds__(kThreads) count_kernel(ChooserArgs a) {
  __shared__ std::int32_t counts[kWindow];
  const int head = static_cast<int>(blockIdx.y);
  const sm80::TokenTile tile =
      sm80::token_tile(a.batch, a.c.segment_tokens, static_cast<int>(blockIdx.x));
  std::int32_t* out = a.c.counts + (head * a.c.segments + blockIdx.x) * a.c.max_blocks;
  const bool listed = tile.tokens > 0 && has_lists(a, tile.sequence);
  for (int first = 0; first < a.c.max_blocks; first += kWindow) {
    const int n = min(kWindow, a.c.max_blocks - first);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) counts[i] = 0;
    __syncthreads();
    if (listed) {
      for_each_choice<false>(a, tile, head, first,
                             [&](int, int block) { atomicAdd(&counts[block], 1); });
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) out[first + i] = counts[i];
    __syncthreads();
  }
}

// Block (x, y): 128 neighbouring blocks, KV head and sequence y.
__global__ void __launch_bounds__(kThreads) add_up_kernel(ChooserArgs a) {
  const int block = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (block >= a.c.max_blocks) return;
  const int head = static_cast<int>(blockIdx.y) / a.batch.num_sequences;
  const int index = static_cast<int>(blockIdx.y) % a.batch.num_sequences;
  ChosenBlock& out = a.c.blocks[std::int64_t{blockIdx.y} * a.c.max_blocks + block];
  const Sequence sequence(a.batch, index);
  if (!has_lists(a, index)) {
    out.count = max(0, sequence.length - max(sequence.first_position(), block * kPageTokens));
    return;
  }
  const int begin = sequence.first_token / a.c.segment_tokens + 2 * index;
  const int end = (sequence.first_token + sequence.tokens) / a.c.segment_tokens + 2 * index + 2;
  std::int32_t* counts = a.c.counts + head * a.c.segments * a.c.max_blocks + block;
  int sum = 0;
#pragma unroll 8
  for (int s = begin; s < end; ++s) {
    const int mine = counts[std::int64_t{s} * a.c.max_blocks];
    counts[std::int64_t{s} * a.c.max_blocks] = sum;
    sum += mine;
  }
  out.count = sum;
}

// The sum over the threads before this one; `total` over all.
template <typename Number>
__device__ Number exclusive_sum(Number mine, Number* warps, Number* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Number sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number other = __shfl_up_sync(0xffffffff, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Number before = 0;
  *total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  return before + sum - mine;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(ChooserArgs a) {
  __shared__ long long sums[kPlanThreads / 32];
  const std::int64_t blocks = a.c.num_blocks;
  for (int p = static_cast<int>(threadIdx.x); p < a.c.part_capacity; p += kPlanThreads) {
    a.c.parts[p] = {-1, 0};
  }
  __syncthreads();
  long long start = 0;
  long long parts = 0;
  for (std::int64_t base = 0; base < blocks; base += kPlanThreads) {
    const std::int64_t i = base + threadIdx.x;
    const bool is_block = i < blocks;
    const int count = is_block ? a.c.blocks[i].count : 0;
    const int index = static_cast<int>(i / a.c.max_blocks % a.batch.num_sequences);
    const long long listed = is_block && has_lists(a, index) ? count : 0;
    const long long pieces =
        count > a.c.part_tokens ? (count + a.c.part_tokens - 1) / a.c.part_tokens : 0;
    long long total = 0;
    const long long at = start + exclusive_sum(listed, sums, &total);
    start += total;
    const long long first = parts + exclusive_sum(pieces, sums, &total);
    parts += total;
    if (!is_block) continue;
    a.c.blocks[i].start = at;
    // Too many only where dense sequences hide in a sparse batch: the rest stays whole.
    const bool is_cut = pieces > 0 && first + pieces <= a.c.part_capacity;
    a.c.blocks[i].first_part = is_cut ? static_cast<int>(first) : -1;
    for (int p = 0; is_cut && p < pieces; ++p) a.c.parts[first + p] = {static_cast<int>(i), p};
  }
}

// Block (x, y): segment x, KV head y. A token's choices are different blocks, so its threads do not
// meet; should a selection name a block twice, both get a place.
__global__ void __launch_bounds__(kThreads) fill_kernel(ChooserArgs a) {
  __shared__ std::int32_t next[kWindow];
  const int head = static_cast<int>(blockIdx.y);
  const sm80::TokenTile tile =
      sm80::token_tile(a.batch, a.c.segment_tokens, static_cast<int>(blockIdx.x));
  if (tile.tokens == 0 || !has_lists(a, tile.sequence)) return;
  const std::int32_t* counts = a.c.counts + (head * a.c.segments + blockIdx.x) * a.c.max_blocks;
  const ChosenBlock* blocks =
      a.c.blocks + (std::int64_t{head} * a.batch.num_sequences + tile.sequence) * a.c.max_blocks;
  const int end = (tile.first + tile.tokens - 1) / kPageTokens + 1;
  for (int first = 0; first < end; first += kWindow) {
    const int n = min(kWindow, end - first);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) next[i] = counts[first + i];
    __syncthreads();
    for_each_choice<true>(a, tile, head, first, [&](int token, int block) {
      const int place = atomicAdd(&next[block], 1);
      a.c.tokens[blocks[first + block].start + place] = token;
    });
  }
}

}  // namespace

Choosers choosers(const AttendParams& params) {
  const Batch& batch = params.batch;
  Choosers c;
  c.heads_kv = params.pages.layout.kv_heads;
  c.max_blocks = static_cast<std::int32_t>(ceil_div(batch.max_kv_length, kPageTokens));
  c.num_blocks = std::int64_t{c.heads_kv} * batch.num_sequences * c.max_blocks;
  const bool listed = is_sparse(params);
  if (listed) {
    c.segment_tokens = static_cast<std::int32_t>(
        std::max<std::int64_t>(kSegmentTokens, ceil_div(batch.num_tokens, kMaxSegments)));
    c.segments = sm80::tile_slots(batch, c.segment_tokens);
  }
  // (token, block) pairs, but for dense sequences in a sparse batch.
  const std::int64_t pairs = std::int64_t{c.heads_kv} * batch.num_tokens *
                             (listed ? std::min(params.columns, c.max_blocks) : c.max_blocks);
  const std::int64_t part = std::max<std::int64_t>(kLeastPartTokens, ceil_div(pairs, kParts));
  c.part_tokens = static_cast<std::int32_t>(std::min<std::int64_t>(part, INT32_MAX));
  // A list of n > part tokens makes fewer than 2 n / part parts.
  c.part_capacity = static_cast<std::int32_t>(2 * ceil_div(pairs, c.part_tokens));
  return c;
}

std::int64_t part_floats(const AttendParams& params, const Choosers& choosers) {
  return std::int64_t{choosers.part_capacity} * 2 * kPageTokens * params.pages.layout.head_dim;
}

Status build_choosers(const Backend& backend, const AttendParams& params,
                      const Choosers& choosers) {
  const cudaStream_t stream = device_of(backend).stream;
  const ChooserArgs args{.batch = params.batch,
                         .selection = params.selection,
                         .columns = params.columns,
                         .c = choosers};
  const dim3 segments(static_cast<unsigned>(choosers.segments),
                      static_cast<unsigned>(choosers.heads_kv));
  if (choosers.segments > 0) count_kernel<<<segments, kThreads, 0, stream>>>(args);
  const dim3 blocks(static_cast<unsigned>(ceil_div(choosers.max_blocks, kThreads)),
                    static_cast<unsigned>(choosers.heads_kv * params.batch.num_sequences));
  add_up_kernel<<<blocks, kThreads, 0, stream>>>(args);
  plan_kernel<<<1, kPlanThreads, 0, stream>>>(args);
  if (choosers.segments > 0) fill_kernel<<<segments, kThreads, 0, stream>>>(args);
  return launched("attend_backward");
}

}  // namespace infllm::cuda::backward
