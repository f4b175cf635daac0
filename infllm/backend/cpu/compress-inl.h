// SPDX-License-Identifier: Apache-2.0
//
// Mean-pooled keys, straight from the pages. Tokens are the lanes of a key plane, so a window is a
// few vector loads and one horizontal sum for every pair of dimensions; next to attention this step
// reads each new key twice (fine) and twice (coarse) and costs under 1% of it.
//
// A task emits up to kWindowsPerTask windows of one head and kind. Which windows a step owes is a
// function of two lengths, so prefill, chunks and decoding are one path.
#pragma once

#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/tile-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

inline constexpr std::int64_t kWindowsPerTask = 64;

HWY_INLINE VF32 low_values(VU32 pairs) { return even_of(pairs); }
HWY_INLINE VF32 low_values(VF32 values) { return values; }
HWY_INLINE VF32 high_values(VU32 pairs) { return odd_of(pairs); }
HWY_INLINE VF32 high_values(VF32 values) { return values; }

// The sums of one dimension pair (or one dimension) over the tokens [first, last) of a sequence.
template <class Num>
void sum_tokens(const Sequence& sequence, std::int64_t offset, std::int64_t element,
                std::int64_t first, std::int64_t last, float* sums) {
  const F32 d;
  VF32 low = hn::Zero(d);
  VF32 high = hn::Zero(d);
  float low_rest = 0;
  float high_rest = 0;
  for (std::int64_t t = first; t < last;) {
    const auto* row = sequence.plane<const typename Num::Element>(t / kPageTokens, offset) +
                      element * kPageTokens;
    const std::int64_t end = std::min(last, (t / kPageTokens + 1) * kPageTokens);
    for (; t + kLanes <= end; t += kLanes) {
      const auto x = Num::load(row + t % kPageTokens);
      low = hn::Add(low, low_values(x));
      high = hn::Add(high, high_values(x));
    }
    for (; t < end; ++t) {  // windows shorter than a register
      low_rest += Num::get(row[t % kPageTokens], 0);
      high_rest += Num::get(row[t % kPageTokens], Num::kPer - 1);
    }
  }
  sums[0] = hn::GetLane(hn::SumOfLanes(d, low)) + low_rest;
  sums[1] = hn::GetLane(hn::SumOfLanes(d, high)) + high_rest;
}

// Windows of `size` tokens every `stride`; `rows` of them begin in a page.
struct Pooling {
  std::int64_t size;
  std::int64_t stride;
  std::int64_t rows;
  std::int64_t plane;  // where the pooled rows of the head are kept
};

template <class Num>
void pool_windows(const Sequence& sequence, const Pooling& pooling, std::int64_t keys,
                  std::int64_t head_dim, std::int64_t first, std::int64_t last) {
  const float inverse = 1.0f / static_cast<float>(pooling.size);
  for (std::int64_t j = first; j < last; ++j) {
    const std::int64_t token = j * pooling.stride;
    auto* out =
        sequence.plane<typename Num::Element>(j / pooling.rows, pooling.plane) + j % pooling.rows;
    for (std::int64_t i = 0; i < head_dim / Num::kPer; ++i) {
      float sums[2];
      sum_tokens<Num>(sequence, keys, i, token, token + pooling.size, sums);
      sums[0] *= inverse;
      sums[1] *= inverse;
      out[i * pooling.rows] = Num::make(sums, 1);
    }
  }
}

Status run_compress(const Backend& backend, const CompressParams& p, std::span<std::byte>) {
  const KvLayout& layout = p.pages.layout;
  const SparseConfig& config = layout.config;
  const PageMap map(layout);
  const auto start = [&](std::int32_t i) {
    return std::int64_t{p.from_length != nullptr
                            ? p.from_length[i]
                            : p.batch.kv_length[i] -
                                  (p.batch.query_start[i + 1] - p.batch.query_start[i])};
  };
  std::int64_t longest = 0;
  for (std::int32_t i = 0; i < p.batch.num_sequences; ++i) {
    longest = std::max(longest, p.batch.kv_length[i] - start(i));
  }
  // Coarse windows are fewer, so their last tasks find nothing to do.
  const std::int64_t pieces = ceil_div(longest / config.kernel_stride + 1, kWindowsPerTask);
  const std::int64_t per_sequence = std::int64_t{layout.kv_heads} * 2 * pieces;
  return with_element(layout.dtype, [&]<class Num>() -> Status {
    backend.pool->parallel_for(p.batch.num_sequences * per_sequence, [&](std::int64_t task, int) {
      const auto index = static_cast<std::int32_t>(task / per_sequence);
      const std::int64_t piece = task % pieces;
      const std::int64_t head = task % per_sequence / pieces / 2;
      const bool coarse = task / pieces % 2 == 1;
      const Pooling pooling =
          coarse ? Pooling{config.coarse_size(), config.coarse_stride(), map.coarse_rows,
                           map.coarse(head)}
                 : Pooling{config.kernel_size, config.kernel_stride, map.fine_rows, map.fine(head)};
      const Sequence sequence(p.pages, p.batch, index);
      const std::int64_t first =
          windows_in(start(index), pooling.size, pooling.stride) + piece * kWindowsPerTask;
      const std::int64_t last = std::min(windows_in(sequence.length, pooling.size, pooling.stride),
                                         first + kWindowsPerTask);
      pool_windows<Num>(sequence, pooling, map.pooled_key(head), layout.head_dim, first, last);
    });
    return {};
  });
}

INFLLM_CPU_END
