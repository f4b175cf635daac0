// SPDX-License-Identifier: Apache-2.0
//
// The fused projection taken apart: one launch where a decode step would make seven. A thread turns
// eight pairs (x[i], x[i + D/2]) of one head, 16 bytes of either half. In a step of one token a
// sequence, more blocks pool the windows that end with it, one KV head each.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Split {
  const T* qkv;
  const float* cos;
  const float* sin;
  T* q;
  T* q_score;  // null: not wanted
  int heads_q;
  int half;  // D / 2
  bool score_keys;
};

// The eight pairs as two vectors.
template <typename T>
struct Pairs {
  Vector<T> low, high;

  __device__ void put(T* row, int half) const {
    *reinterpret_cast<Vector<T>*>(row) = low;
    *reinterpret_cast<Vector<T>*>(row + half) = high;
  }
  __device__ Pairs turned(const float* cos, const float* sin) const {
    Pairs result;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float a = to_float(low.values[k]);
      const float b = to_float(high.values[k]);
      result.low.values[k] = to<T>(a * cos[k] - b * sin[k]);
      result.high.values[k] = to<T>(b * cos[k] + a * sin[k]);
    }
    return result;
  }
};

// Groups of 16 tokens are summed row by row and windows put together from them, as in compress.cu:
// the same sums in the same order. The step's own key is turned here once more, since another block
// writes it to its page meanwhile.
//
// threadIdx: 16 bytes of a row, group.
template <typename T>
__device__ void pool_windows(const Split<T>& s, const PagePool& pool, const Sequence& sequence,
                             int head) {
  constexpr int kFineGroups = kFineTokens / kFineStride;
  constexpr int kCoarseGroups = kCoarseTokens / kFineStride;
  constexpr int kMaxDim = 128;
  static_assert(kCoarseGroups * kMaxDim / kVector <= kThreads);
  __shared__ float sums[kCoarseGroups][kMaxDim];
  const int length = sequence.length;
  const auto ends_window = [&](int tokens, int stride) {
    return sequence.tokens == 1 && length >= tokens && (length - tokens) % stride == 0;
  };
  const bool fine = ends_window(kFineTokens, kFineStride);
  const bool coarse = ends_window(kCoarseTokens, kCoarseStride);
  if (!fine && !coarse) {
    wait_for_previous();
    return;
  }
  const int dim = 2 * s.half;
  const int units = dim / kVector;
  const int groups = coarse ? kCoarseGroups : kFineGroups;
  const int group = static_cast<int>(threadIdx.x) / units;
  const int column = static_cast<int>(threadIdx.x) % units * kVector;
  const int first = length - (groups - group) * kFineStride;  // of this thread's tokens
  const int page = group < groups ? sequence.page(first / kPageTokens, pool.num_pages) : -1;
  const T* rows = nullptr;
  if (page >= 0) {
    rows = pool.plane<const T>(page, pool.map.pooled_key(head)) + first % kPageTokens * dim;
    if (column == 0) prefetch(rows, kFineStride * dim * static_cast<int>(sizeof(T)));
  }
  wait_for_previous();

  if (rows != nullptr) {
    Vector<T> newest;
    const std::int64_t heads = s.heads_q + 2 * pool.map.heads;
    const T* row = s.qkv + (sequence.first_token * heads + s.heads_q + head) * dim;
    const int pair = column % s.half;
    const Pairs<T> raw{*reinterpret_cast<const Vector<T>*>(row + pair),
                       *reinterpret_cast<const Vector<T>*>(row + s.half + pair)};
    const std::int64_t angle = sequence.first_token * std::int64_t{s.half} + pair;
    const Pairs<T> key = s.score_keys ? raw : raw.turned(s.cos + angle, s.sin + angle);
    newest = column < s.half ? key.low : key.high;
    float sum[kVector] = {};
#pragma unroll
    for (int i = 0; i < kFineStride; ++i) {
      const bool is_newest = first + i == length - 1;
      const Vector<T> x =
          is_newest ? newest : *reinterpret_cast<const Vector<T>*>(rows + i * dim + column);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum[k] += to_float(x.values[k]);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums[group][column + k] = sum[k];
  } else if (group < groups) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums[group][column + k] = 0;
  }
  __syncthreads();

  // The last `many` groups' mean, into the page in which the first of them begins.
  const auto write = [&](int many, std::int64_t plane, int row) {
    const int begin = length - many * kFineStride;
    const int to_page = sequence.page(begin / kPageTokens, pool.num_pages);
    if (to_page < 0) return;
    float mean[kVector] = {};
    for (int g = groups - many; g < groups; ++g) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) mean[k] += sums[g][column + k];
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) mean[k] /= static_cast<float>(many * kFineStride);
    store(pool.plane<T>(to_page, plane) + row * dim + column, mean);
  };
  if (group == 0 && fine) {
    write(kFineGroups, pool.map.fine(head), (length - kFineTokens) / kFineStride % kFineRows);
  }
  if (group == 1 && coarse) write(kCoarseGroups, pool.map.coarse(head), 0);
}

// The free slots of a page that this step began are cleared, as in kv_append: values behind a
// sequence's end have weight 0, and 0 * NaN is not 0.
//
// Lengths and page tables are looked at before the kernel in front has ended, so they must come
// from copies, as a plan's do, and not from that kernel.
//
// blockIdx: units of work and behind them, from pool_block on, KV heads to pool; sequence.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(Split<T> s, PagePool pool, Batch batch, int pool_block) {
  start_next();
  const Sequence sequence(batch, blockIdx.y);
  if (static_cast<int>(blockIdx.x) >= pool_block) {
    return pool_windows(s, pool, sequence, static_cast<int>(blockIdx.x) - pool_block);
  }
  const int units = s.half / kVector;  // of a head
  const int heads = s.heads_q + 2 * pool.map.heads;
  const std::int64_t work = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto index = static_cast<int>(work / (heads * units));
  const auto unit = static_cast<int>(work % (heads * units));
  const int head = unit / units;
  const int column = unit % units * kVector;
  const bool is_token = index < sequence.tokens;
  const std::int64_t token = sequence.first_token + index;
  const int position = sequence.first_position() + index;
  const int block = position / kPageTokens;
  bool is_needed = is_token;
  if (!is_token && sequence.tokens > 0 && head >= s.heads_q) {
    const int last_block = (sequence.length - 1) / kPageTokens;
    is_needed = block == last_block && block * kPageTokens >= sequence.first_position();
  }
  int page = -1;
  if (is_needed && head >= s.heads_q) page = sequence.page(block, pool.num_pages);
  wait_for_previous();
  if (!is_needed) return;

  Pairs<T> raw{};
  Pairs<T> turned{};
  if (is_token) {
    const T* row = s.qkv + (token * heads + head) * 2 * s.half + column;
    raw.low = *reinterpret_cast<const Vector<T>*>(row);
    raw.high = *reinterpret_cast<const Vector<T>*>(row + s.half);
    if (head < s.heads_q + pool.map.heads) {
      turned = raw.turned(s.cos + token * s.half + column, s.sin + token * s.half + column);
    }
  }
  if (head < s.heads_q) {
    const std::int64_t place = (token * s.heads_q + head) * 2 * s.half + column;
    turned.put(s.q + place, s.half);
    if (s.q_score != nullptr) raw.put(s.q_score + place, s.half);
    return;
  }

  if (page < 0) return;
  const std::int64_t slot = std::int64_t{position % kPageTokens} * 2 * s.half + column;
  const int kv_head = (head - s.heads_q) % pool.map.heads;
  if (head >= s.heads_q + pool.map.heads) {
    raw.put(pool.plane<T>(page, pool.map.value(kv_head)) + slot, s.half);
    return;
  }
  turned.put(pool.plane<T>(page, pool.map.key(kv_head)) + slot, s.half);
  if (s.score_keys) raw.put(pool.plane<T>(page, pool.map.pooled_key(kv_head)) + slot, s.half);
}

}  // namespace

bool rope_append_pools(const Backend&, const RopeAppendParams& p) {
  return p.pages.layout.pooled_keys && p.batch.max_query_length == 1;
}

Status rope_append(const Backend& backend, const RopeAppendParams& p, Workspace) {
  const Device& device = device_of(backend);
  const KvLayout& layout = p.pages.layout;
  const int half = layout.head_dim / 2;
  const std::int64_t work = (std::int64_t{p.batch.max_query_length} + kPageTokens) *
                            (p.heads_q + 2 * layout.kv_heads) * (half / kVector);
  const auto pool_block = static_cast<int>(ceil_div(work, kThreads));
  const dim3 grid(static_cast<unsigned>(pool_block + (p.pool ? layout.kv_heads : 0)),
                  static_cast<unsigned>(p.batch.num_sequences));
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    const Split<T> split{static_cast<const T*>(p.qkv),
                         p.cos,
                         p.sin,
                         static_cast<T*>(p.q),
                         layout.score_keys() ? static_cast<T*>(p.q_score) : nullptr,
                         p.heads_q,
                         half,
                         layout.score_keys()};
    return launch(device, "rope_append", rope_append_kernel<T>, grid, kThreads, 0, split,
                  PagePool(p.pages), p.batch, pool_block);
  });
}

}  // namespace infllm::cuda
