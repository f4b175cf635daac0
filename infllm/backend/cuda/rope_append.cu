// SPDX-License-Identifier: Apache-2.0
//
// The fused projection taken apart: one launch where a decode step would make six. A thread turns
// eight pairs (x[i], x[i + D/2]) of one head, 16 bytes of either half.
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

// The free slots of a page that this step began are cleared, as in kv_append: values behind a
// sequence's end have weight 0, and 0 * NaN is not 0.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_append_kernel(Split<T> s, PagePool pool, Batch batch) {
  start_next();
  wait_for_previous();
  const int units = s.half / kVector;  // of a head
  const int heads = s.heads_q + 2 * pool.map.heads;
  const std::int64_t work = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto index = static_cast<int>(work / (heads * units));
  const auto unit = static_cast<int>(work % (heads * units));
  const Sequence sequence(batch, blockIdx.y);
  if (sequence.tokens == 0 || index >= sequence.tokens + kPageTokens) return;
  const int head = unit / units;
  const int column = unit % units * kVector;
  const bool is_token = index < sequence.tokens;
  const std::int64_t token = sequence.first_token + index;

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
    if (!is_token) return;
    const std::int64_t place = (token * s.heads_q + head) * 2 * s.half + column;
    turned.put(s.q + place, s.half);
    if (s.q_score != nullptr) raw.put(s.q_score + place, s.half);
    return;
  }

  const int position = sequence.first_position() + index;
  const int block = position / kPageTokens;
  if (!is_token) {
    const int last_block = (sequence.length - 1) / kPageTokens;
    if (block != last_block || block * kPageTokens < sequence.first_position()) return;
  }
  const int page = sequence.page(block, pool.num_pages);
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

Status rope_append(const Backend& backend, const RopeAppendParams& p, Workspace) {
  const Device& device = device_of(backend);
  const KvLayout& layout = p.pages.layout;
  const int half = layout.head_dim / 2;
  const std::int64_t work = (std::int64_t{p.batch.max_query_length} + kPageTokens) *
                            (p.heads_q + 2 * layout.kv_heads) * (half / kVector);
  const dim3 grid(static_cast<unsigned>((work + kThreads - 1) / kThreads),
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
                  PagePool(p.pages), p.batch);
  });
}

}  // namespace infllm::cuda
