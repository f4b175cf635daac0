// SPDX-License-Identifier: Apache-2.0
//
// The step's rotary tables, where they are read: a chunk of 8192 tokens needs a million cosines,
// which a host thread would work on for as long as the device computes a layer. A thread a pair.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;

// The arithmetic of fill_rope_row(): float32 products in its order, never fused, and the functions
// in double, so that host and device tables agree to the last bit but for a rare rounding.
__global__ void rope_tables_kernel(RopeTableParams p) {
  start_next();
  wait_for_previous();
  const int half = p.head_dim / 2;
  const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t t = index / half;
  const int i = static_cast<int>(index % half);
  if (t >= p.tokens) return;
  const std::int32_t position = p.positions[t];
  const std::int64_t length = p.lengths != nullptr ? p.lengths[t] : std::int64_t{position} + 1;
  const bool is_long = p.switch_length > 0 && length > p.switch_length;
  const float stretched = __fmul_rn(static_cast<float>(position), p.scales[is_long ? half + i : i]);
  const float angle = __fmul_rn(stretched, p.frequencies[i]);
  double sine = 0;
  double cosine = 0;
  sincos(static_cast<double>(angle), &sine, &cosine);
  p.cos[index] = __fmul_rn(static_cast<float>(cosine), p.factor);
  p.sin[index] = __fmul_rn(static_cast<float>(sine), p.factor);
}

}  // namespace

Status rope_tables(const Backend& backend, const RopeTableParams& p, Workspace) {
  const std::int64_t pairs = p.tokens * (p.head_dim / 2);
  return launch(device_of(backend), "rope_tables", rope_tables_kernel,
                static_cast<unsigned>((pairs + kThreads - 1) / kThreads), kThreads, 0, p);
}

}  // namespace infllm::cuda
