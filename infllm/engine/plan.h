// SPDX-License-Identifier: Apache-2.0
//
// The plan of one step: everything ragged, decided once on the host, copied to the backend in one
// piece and read by every layer.
//
//   Plan plan = INFLLM_TRY(Plan::create(backend, limits));
//   INFLLM_TRY(plan.build({{&first, 512}, {&second, 1}}, rule, pool));
//   model.forward({.batch = plan.batch(), .token_ids = plan.token_ids(), ...});
//
// The next build() ends the life of the arrays that batch() points to.
//
// Where the backend can record steps, one of decoding alone is made repeatable: its arrays lie at
// places that depend on the number of sequences only, page tables have rows for the longest
// sequence, and the host's maxima are the limits. What was recorded for one such step then serves
// every later one with as many sequences.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infllm/engine/kv_pool.h"
#include "infllm/engine/sequence.h"
#include "infllm/ops/backend.h"
#include "infllm/ops/batch.h"

namespace infllm::engine {

// A sequence's share of the step: its first `tokens` uncached tokens. Its pages hold them already.
struct Work {
  const Sequence* sequence = nullptr;
  std::int32_t tokens = 0;
  float temperature = 0;  // that a token will be drawn with
  // Logits of the last of them; false within a prompt.
  bool wants_logits() const { return tokens == sequence->uncached(); }
};

struct PlanLimits {
  std::int32_t max_tokens = 0;
  std::int32_t max_sequences = 0;
  std::int32_t max_pages = 0;  // of one sequence
  std::int32_t max_kv_length = 0;
};

class Plan {
 public:
  static Result<Plan> create(const Backend& backend, const PlanLimits& limits);

  Status build(std::span<const Work> work, const ModeRule& rule, const KvPool& pool);

  const Batch& batch() const { return batch_; }
  // All in the backend's memory.
  const std::int32_t* token_ids() const { return token_ids_; }  // [T]
  const std::int32_t* positions() const { return positions_; }  // [T]
  const std::int32_t* lengths() const { return lengths_; }      // [T] ForwardParams::lengths
  // [R]; null: every token.
  const std::int32_t* logit_rows() const { return logit_rows_; }
  const float* temperatures() const { return temperatures_; }  // [R]

  std::int32_t num_logits() const { return num_logits_; }    // R
  const std::vector<Mode>& modes() const { return modes_; }  // of each item of work
  bool repeatable() const { return repeatable_; }

  static std::int64_t bytes(const PlanLimits& limits);

 private:
  Backend backend_;
  PlanLimits limits_;
  Buffer device_;
  std::vector<std::int32_t> staging_;  // what device_ gets
  std::vector<Mode> modes_;
  Batch batch_;
  const std::int32_t* token_ids_ = nullptr;
  const std::int32_t* positions_ = nullptr;
  const std::int32_t* lengths_ = nullptr;
  const std::int32_t* logit_rows_ = nullptr;
  const float* temperatures_ = nullptr;
  std::int32_t num_logits_ = 0;
  bool repeatable_ = false;
};

}  // namespace infllm::engine
