// SPDX-License-Identifier: Apache-2.0
//
// One sequence of made-up tokens through a model, timed: no sampling, no text.
//
//   BenchRunner runner = INFLLM_TRY(BenchRunner::create(model, {.context = 4096, ...}));
//   INFLLM_TRY(runner.start(1024, 512));                     // 1024 tokens in the cache
//   BenchRun run = INFLLM_TRY(runner.prefill(false));        // the next 512, as one prompt
//   double shared = INFLLM_TRY(runner.overlap());            // of its last tokens' selections
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "infllm/engine/kv_pool.h"
#include "infllm/engine/plan.h"
#include "infllm/engine/runner.h"
#include "infllm/engine/sequence.h"
#include "infllm/engine/timings.h"
#include "infllm/model/model.h"

namespace infllm::app {

struct BenchRun {
  double seconds = 0;
  model::ForwardTimes times;
  engine::Visibility visible;
  bool sparse = false;  // some of the tokens attended sparsely
};

class BenchRunner {
 public:
  struct Options {
    std::int32_t context = 0;
    std::int32_t chunk_tokens = 0;  // 0: engine::default_chunk_tokens()
    std::optional<DType> kv_dtype;  // null: the model's choice
    bool dense = false;
    std::int32_t repeat = 1;  // times that each token comes in a row
    bool fill = false;        // start() makes up keys and values too, instead of computing them
    std::int64_t memory_limit = 0;
  };
  static Result<BenchRunner> create(const model::Model& model, const Options& options);

  // Brings the cache to `depth` tokens, as the beginning of a prompt of depth + `prompt` tokens.
  Status start(std::int32_t depth, std::int32_t prompt);
  // The rest of that prompt.
  Result<BenchRun> prefill(bool by_parts);
  // `count` tokens one by one, up to the numbers that a sampler needs.
  Result<BenchRun> decode(std::int32_t count, bool by_parts);
  // `by_parts`: fill BenchRun::times. A device waits for each part then, and replays nothing.

  // neighbours_overlap() (ops/overlap.h) of the last tokens in the cache, which are computed once
  // more: the mean of all layers.
  Result<double> overlap();

  DType kv_dtype() const { return pool_.layout().dtype; }

 private:
  BenchRunner(const model::Model& model, const Options& options, engine::KvPool pool,
              engine::Plan plan, engine::Runner runner);
  Status advance(std::int32_t tokens, bool by_parts, BenchRun& run);
  Status fill(std::int32_t depth);
  std::int32_t made_up_token(std::int32_t position) const;

  const model::Model* model_;
  Options options_;
  engine::KvPool pool_;
  engine::Plan plan_;
  engine::Runner runner_;
  engine::ModeRule rule_;
  engine::Sequence sequence_;
};

}  // namespace infllm::app
