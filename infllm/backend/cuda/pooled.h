// SPDX-License-Identifier: Apache-2.0
//
// The pooled keys of a step's sparse sequences, gathered from their pages into plain arrays, so
// that a scorer streams them without looking up pages:
//
//   fine   [B][Hkv][fine_rows][D]      fine_rows, coarse_rows: windows of the longest sequence,
//   coarse [B][Hkv][coarse_rows][D]    rounded up to 64
//
// Rows after a sequence's last window are zero up to the next multiple of 64 and unwritten from
// there on, as are sequences whose tokens need no score (dense, or every block fits in the budget).
// coarse is absent (coarse_rows = 0) when the fine windows normalise the scores.
//
//   const PooledSizes sizes(params);
//   PooledKeys keys = carve(sizes, arena);
//   INFLLM_TRY(gather_pooled(backend, params, keys));
#pragma once

#include <cstddef>
#include <cstdint>

#include "infllm/core/arena.h"
#include "infllm/ops/score.h"

namespace infllm::cuda {

inline constexpr int kPooledTile = 64;  // windows that a scorer takes at once

struct PooledSizes {
  explicit PooledSizes(const ScoreParams& params);

  std::int64_t fine_bytes() const { return planes * fine_rows * row_bytes; }
  std::int64_t coarse_bytes() const { return planes * coarse_rows * row_bytes; }
  // Workspace that carve() takes.
  std::size_t bytes() const;

  std::int64_t planes;       // B * Hkv
  std::int64_t fine_rows;    // of one plane
  std::int64_t coarse_rows;  // of one plane
  std::int64_t row_bytes;
};

struct PooledKeys {
  std::byte* fine = nullptr;
  std::byte* coarse = nullptr;
};

PooledKeys carve(const PooledSizes& sizes, Arena& arena);

// One launch, a few microseconds: 40 bytes for each key of the context.
Status gather_pooled(const Backend& backend, const ScoreParams& params, const PooledKeys& to);

}  // namespace infllm::cuda
