// SPDX-License-Identifier: Apache-2.0
//
// InfLLM-V2's numbers, in Hugging Face's spelling, and the counts that follow from them.
//
// Letters used in every shape comment of this repository:
//   T tokens of this step (packed over sequences)     S key tokens      B sequences
//   Hq query heads   Hkv key/value heads   G = Hq / Hkv   D head dimension
//   W windows (mean-pooled keys)   N blocks of block_size keys   K selected blocks   P pages
//
// Positions: the token at absolute position p of its sequence lies in block p / block_size, its own
// block. A window is visible to p when its last token is at or before p.
#pragma once

#include <algorithm>
#include <cstdint>

#include "infllm/core/status.h"

namespace infllm {

// Which pooled keys normalise the scores (paper, section 3.3): the 4x coarser ones, or the fine
// ones.
enum class LseSource : std::uint8_t { kCoarse, kFine };

// The precision in which block scores are compared. The released code compares bf16 values, so ties
// at the cut are common there; ties go to the lower block index.
enum class ScoreRounding : std::uint8_t { kBF16, kNone };

// Windows of `size` tokens every `stride`, complete within the first `length` tokens.
constexpr std::int64_t windows_in(std::int64_t length, std::int64_t size, std::int64_t stride) {
  return length < size ? 0 : (length - size) / stride + 1;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct SparseConfig {
  // config.json, "sparse_config".
  std::int32_t kernel_size = 32;    // tokens pooled into one fine window
  std::int32_t kernel_stride = 16;  // tokens between fine windows
  std::int32_t init_blocks = 1;     // sink blocks, always selected
  std::int32_t block_size = 64;     // tokens of a block; also of a cache page
  std::int32_t window_size = 2048;  // tokens of the always-selected local window
  std::int32_t topk = 64;           // blocks besides window_size / block_size
  bool use_nope = false;            // score with queries and keys before RoPE
  std::int32_t dense_len = 8192;    // dense attention below this length; -1: always sparse

  // Not in config.json: variants of the published code.
  LseSource lse_source = LseSource::kCoarse;
  ScoreRounding score_rounding = ScoreRounding::kBF16;
  // The window of the June 2025 code: window_size / block_size blocks that include the query's own,
  // instead of that many before it. One more block is then chosen freely.
  bool legacy_window = false;

  // The coarse windows are four times as long and as far apart.
  std::int32_t coarse_size() const { return 4 * kernel_size; }
  std::int32_t coarse_stride() const { return 4 * kernel_stride; }

  std::int32_t window_blocks() const { return window_size / block_size; }
  // Always-selected blocks that end with the query's own block, which they count.
  std::int32_t local_blocks() const { return window_blocks() + (legacy_window ? 0 : 1); }
  // Everything that a token attends to: sink, local and freely chosen blocks together.
  std::int32_t budget_blocks() const { return topk + window_blocks(); }

  std::int64_t blocks_in(std::int64_t length) const { return ceil_div(length, block_size); }
  std::int64_t fine_windows(std::int64_t length) const {
    return windows_in(length, kernel_size, kernel_stride);
  }
  std::int64_t coarse_windows(std::int64_t length) const {
    return windows_in(length, coarse_size(), coarse_stride());
  }
  // Fine windows that overlap block b: [first, first + count) before clipping to [0, visible). With
  // the released numbers the five windows 4b-1 .. 4b+3.
  std::int64_t first_window_of(std::int64_t block) const {
    return block * (block_size / kernel_stride) - (kernel_size / kernel_stride - 1);
  }
  std::int32_t windows_per_block() const {
    return block_size / kernel_stride + kernel_size / kernel_stride - 1;
  }

  // Whether a sequence of `length` keys attends sparsely. Length is the whole prompt's while it is
  // prefilled, in however many chunks, and the cache's length during decoding.
  bool is_sparse_at(std::int64_t length) const { return length >= dense_len; }
  // The first block that the local window of the token at position p forces.
  std::int64_t first_local_block(std::int64_t p) const {
    return std::max<std::int64_t>(0, p / block_size - local_blocks() + 1);
  }
  // Every causal block fits in the budget: nothing to score.
  bool selects_all_at(std::int64_t p) const { return p / block_size + 1 <= budget_blocks(); }
};

// Ranges and the divisibility that windows, blocks and pages need of each other.
Status check(const SparseConfig& config);

}  // namespace infllm
