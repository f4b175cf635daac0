// SPDX-License-Identifier: Apache-2.0
//
// From the fused projection to rotated queries, rotated keys and values in one pass. A thread turns
// eight pairs (x[i], x[i + D/2]) of one head, or copies as many values.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void split_qkv_kernel(SplitQkvParams p) {
  start_next();
  wait_for_previous();
  const int half = p.head_dim / 2;
  const int units = half / kVector;
  const int heads = p.heads_q + 2 * p.heads_kv;
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t token = index / (heads * units);
  if (token >= p.tokens) return;
  const int head = static_cast<int>(index % (heads * units)) / units;
  const int i = static_cast<int>(index % units) * kVector;
  const T* from = static_cast<const T*>(p.qkv) + (token * heads + head) * p.head_dim + i;
  float low[kVector];
  float high[kVector];
  load(from, low);
  load(from + half, high);
  const auto write = [&](void* rows, int first_head, int row_heads) {
    if (rows == nullptr) return;
    T* to = static_cast<T*>(rows) + (token * row_heads + head - first_head) * p.head_dim + i;
    store(to, low);
    store(to + half, high);
  };
  if (head >= p.heads_q + p.heads_kv) {
    write(p.v, p.heads_q + p.heads_kv, p.heads_kv);
    return;
  }
  const bool is_query = head < p.heads_q;
  const int first_head = is_query ? 0 : p.heads_q;
  const int row_heads = is_query ? p.heads_q : p.heads_kv;
  write(is_query ? p.q_score : p.k_score, first_head, row_heads);
  const float* cosines = p.cos + token * half + i;
  const float* sines = p.sin + token * half + i;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float turned = low[k] * cosines[k] - high[k] * sines[k];
    high[k] = high[k] * cosines[k] + low[k] * sines[k];
    low[k] = turned;
  }
  write(is_query ? p.q : p.k, first_head, row_heads);
}

}  // namespace

bool split_qkv_covers(const Backend&, const SplitQkvParams& p) {
  const void* arrays[] = {p.qkv, p.q, p.k, p.v, p.q_score, p.k_score};
  for (const void* array : arrays) {
    if (!is_vector_aligned(array)) return false;
  }
  return p.head_dim % (2 * kVector) == 0;
}

Status split_qkv(const Backend& backend, const SplitQkvParams& p, Workspace) {
  const std::int64_t threads = p.tokens * (p.heads_q + 2 * p.heads_kv) * (p.head_dim / 2 / kVector);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return launch(device_of(backend), "split_qkv", split_qkv_kernel<T>, blocks, kThreads, 0, p);
  });
}

}  // namespace infllm::cuda
