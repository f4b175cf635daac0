// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of a row without sorting: a bisection over bit patterns finds the K-th largest
// score, each step one vector pass over the row that counts; a second pass writes the blocks above
// it, and those equal to it from the lowest index until the row is full. A row of 1024 blocks is 64
// vectors, and it fits in L1.
//
// Floats are compared through the integers of the same order: negative ones have their other 31
// bits flipped. bf16 scores end in 16 zero bits, so a bisection of them takes at most 16 steps.
#pragma once

#include <bit>
#include <limits>

#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/tile-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

using I32 = hn::RebindToSigned<F32>;
using VI32 = hn::Vec<I32>;

// Adding 0 turns -0 into 0.
HWY_INLINE VI32 ordered(VF32 x) {
  const I32 d;
  const VI32 bits = hn::BitCast(d, hn::Add(x, hn::Zero(F32())));
  const VI32 negative = hn::ShiftRight<31>(bits);
  return hn::Xor(bits, hn::And(negative, hn::Set(d, 0x7fffffff)));
}
inline std::int32_t ordered(float x) {
  const std::int32_t bits = std::bit_cast<std::int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// How many of x[0 .. n) are at least `threshold`.
HWY_INLINE std::int64_t count_at_least(const float* x, std::int64_t n, std::int32_t threshold) {
  const I32 d;
  const VI32 below = hn::Set(d, threshold);
  std::int64_t count = 0;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    count += static_cast<std::int64_t>(
        hn::CountTrue(d, hn::Not(hn::Lt(ordered(hn::LoadU(F32(), x + i)), below))));
  }
  for (; i < n; ++i) count += ordered(x[i]) >= threshold;
  return count;
}

// The largest threshold that at least k of x[0 .. n) reach; 0 < k <= n.
inline std::int32_t kth_largest(const float* x, std::int64_t n, std::int64_t k) {
  // Invariant: `low` is reached by at least k, `high` by fewer.
  std::int64_t low = std::numeric_limits<std::int32_t>::min();
  std::int64_t high = std::int64_t{std::numeric_limits<std::int32_t>::max()} + 1;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    const std::int64_t count = count_at_least(x, n, static_cast<std::int32_t>(middle));
    if (count >= k) {
      low = middle;
      if (count == k) break;  // any such threshold separates the same set
    } else {
      high = middle;
    }
  }
  return static_cast<std::int32_t>(low);
}

// Writes the indices, from `base`, of the k largest of x[0 .. n) in ascending order.
inline std::int32_t* take_largest(const float* x, std::int64_t n, std::int64_t k, std::int64_t base,
                                  std::int32_t* out) {
  if (k <= 0) return out;
  if (k >= n) {
    for (std::int64_t i = 0; i < n; ++i) *out++ = static_cast<std::int32_t>(base + i);
    return out;
  }
  const std::int32_t threshold = kth_largest(x, n, k);
  // Not above the threshold but equal to it: how many are wanted.
  const bool last = threshold == std::numeric_limits<std::int32_t>::max();
  std::int64_t ties = k - (last ? 0 : count_at_least(x, n, threshold + 1));
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t key = ordered(x[i]);
    if (key < threshold) continue;
    if (key == threshold && ties-- <= 0) continue;
    *out++ = static_cast<std::int32_t>(base + i);
  }
  return out;
}

// The row of the token at `position`: sink, best, local. Forced blocks are known from the position;
// when the budget is short the local window comes first, nearest first.
inline void select_row(const SparseConfig& config, std::int64_t position, const float* scores,
                       std::int64_t columns, std::int32_t* row) {
  const std::int64_t own = position / config.block_size;
  const std::int64_t first_local = std::max(config.first_local_block(position), own + 1 - columns);
  const std::int64_t local = own + 1 - first_local;
  const std::int64_t sink =
      std::min<std::int64_t>({config.init_blocks, first_local, columns - local});
  const std::int64_t dynamic = std::min(columns - local - sink, first_local - sink);
  std::int32_t* out = row;
  for (std::int64_t b = 0; b < sink; ++b) *out++ = static_cast<std::int32_t>(b);
  out = take_largest(scores + sink, first_local - sink, dynamic, sink, out);
  for (std::int64_t b = first_local; b <= own; ++b) *out++ = static_cast<std::int32_t>(b);
  std::fill(out, row + columns, -1);
}

Status run_select(const Backend& backend, const SelectParams& p, std::span<std::byte>) {
  constexpr int kRows = 16;  // tokens of a task
  const std::int64_t tiles = max_tiles(p.batch, kRows);
  const std::int64_t per_sequence = p.heads_kv * tiles;
  const std::int64_t blocks = p.blocks();
  const std::int64_t columns = p.columns();
  backend.pool->parallel_for(p.batch.num_sequences * per_sequence, [&](std::int64_t task, int) {
    const std::int64_t index = task / per_sequence;
    if (p.batch.sparse[index] == 0) return;
    const std::int64_t head = task % per_sequence / tiles;
    const std::int64_t start = p.batch.query_start[index];
    const std::int64_t tokens = p.batch.query_start[index + 1] - start;
    const std::int64_t last = std::min(tokens, (task % tiles + 1) * kRows);
    for (std::int64_t i = task % tiles * kRows; i < last; ++i) {
      const std::int64_t at = head * p.batch.num_tokens + start + i;
      select_row(p.config, p.batch.kv_length[index] - tokens + i,
                 static_cast<const float*>(p.scores) + at * blocks, columns,
                 p.selection + at * columns);
    }
  });
  return {};
}

INFLLM_CPU_END
