// SPDX-License-Identifier: Apache-2.0
//
// Whole steps, scores, selection and attention, in one launch: what both kernels that do this are
// given, and how the device is shared out among the rows of a launch.
//
//   select_attend.cu   few rows: everything is there once for each warp (row_part.cuh)
//   row_stream.cu      up to a row for each multiprocessor: warps read streams (row_stream.cuh)
//
// Both divide a row, a (sequence, KV head), among thread blocks of eight warps, its parts. These
// tell each other three things, through words that are kNothing until they are written
// (exchange.cuh):
//
//   normalisers   each part's share of the soft-max's denominator, for every head
//   keys          what the blocks that it scored have to offer; each part then makes the choice
//   results       what it attended to; each part then puts some of the outputs together
#pragma once

#include <algorithm>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/part_results.cuh"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/ops/select_attend.h"

namespace infllm::cuda::decode {

inline constexpr int kStepWarps = 8;
inline constexpr int kStepThreads = 32 * kStepWarps;
inline constexpr int kMaxColumns = kStepThreads;  // of a selection
inline constexpr int kItemBlocks = 8;  // that follow each other, and whose keys one warp finds
inline constexpr int kMaxKeys = 1 << 19;

struct StepArgs {
  PagePool pool;
  Batch batch;
  const void* q_score;
  const void* q;
  void* o;
  float* lse;
  std::int32_t* selection;
  int columns;
  int heads_q;
  int parts;          // of a row
  float score_scale;  // to logits in powers of 2
  float scale;
  int init_blocks;
  int local_blocks;
  bool fine_normaliser;
  bool settled;  // SelectAttendParams
  // kNothing everywhere between two launches, but for the set of results that was used last.
  // Normalisers and keys are cleared at the end, by every part a share, when all parts have sent
  // results and so have read them; its results a part clears one launch later.
  std::uint32_t* normalisers;  // [rows][16][parts]
  std::uint32_t* results;      // of PartResults, [rows][parts]
  std::uint32_t* keys;         // [rows][key_stride], two halves each
  int key_stride;
  std::uint32_t* arrivals;  // of thread blocks (arrivals.cuh)
};

// Where in Device::exchange what is.
struct ExchangeWords {
  explicit ExchangeWords(int sm_count)
      : results(std::int64_t{kRowHeads} * sm_count),
        keys(results + std::int64_t{kPartWords} * sm_count),
        arrivals(keys + kMaxKeys),
        end(arrivals + 8) {}

  std::int64_t normalisers = 0;
  std::int64_t results, keys, arrivals, end;
};

struct StepSizes {
  // together: outputs that a part puts together at a time.
  StepSizes(const Device& device, const SelectAttendParams& p, int together, int max_parts)
      : rows(std::int64_t{p.attend.batch.num_sequences} * p.attend.pages.layout.kv_heads),
        key_stride(
            static_cast<int>(ceil_div(p.choose.select.blocks(), kItemBlocks) * kItemBlocks)) {
    const KvLayout& layout = p.attend.pages.layout;
    // Everybody merges something, and waits for everybody when it does.
    const std::int64_t shares = p.attend.heads_q / layout.kv_heads * layout.head_dim / together;
    parts = static_cast<int>(std::min<std::int64_t>(
        {device.sm_count / std::max<std::int64_t>(rows, 1), shares, max_parts}));
  }

  std::int64_t rows;
  int key_stride;
  int parts;
};

// What both kernels ask for. Groups of at most 16 heads, heads of 64 or 128, budgets of at most 256
// blocks, scores compared as bf16, and a device whose words nobody else uses.
inline bool is_whole_step(const Backend& backend, const SelectAttendParams& p,
                          const StepSizes& sizes) {
  return device_of(backend).exchange != nullptr && attends(backend, p.attend) &&
         scores(backend, p.choose) && sizes.parts > 0 &&
         p.attend.heads_q / p.attend.pages.layout.kv_heads <= kRowHeads &&
         p.attend.columns <= kMaxColumns && sizes.rows * sizes.key_stride <= kMaxKeys &&
         p.choose.score.config.score_rounding == ScoreRounding::kBF16;
}

inline StepArgs step_args(const Device& device, const SelectAttendParams& p,
                          const StepSizes& sizes) {
  const SparseConfig& config = p.choose.score.config;
  const ExchangeWords words(device.sm_count);
  return {.pool = PagePool(p.attend.pages),
          .batch = p.attend.batch,
          .q_score = p.choose.score.q,
          .q = p.attend.q,
          .o = p.attend.o,
          .lse = static_cast<float*>(p.attend.lse),
          .selection = p.choose.select.selection,
          .columns = p.choose.select.columns(),
          .heads_q = p.attend.heads_q,
          .parts = sizes.parts,
          .score_scale = p.choose.score.scale * kLog2E,
          .scale = p.attend.scale * kLog2E,
          .init_blocks = config.init_blocks,
          .local_blocks = config.local_blocks(),
          .fine_normaliser = config.lse_source == LseSource::kFine,
          .settled = p.settled,
          .normalisers = device.exchange + words.normalisers,
          .results = device.exchange + words.results,
          .keys = device.exchange + words.keys,
          .key_stride = sizes.key_stride,
          .arrivals = device.exchange + words.arrivals};
}

}  // namespace infllm::cuda::decode
