// SPDX-License-Identifier: Apache-2.0
//
// Where a request's time went, and how much it saw.
//
// "Visible" is the share of the causally visible keys that attention read: 1 for dense attention,
// and for a sparse token at position p min(budget, own block + 1) blocks, its own one up to p. The
// first answer token comes out of the prompt's last step, so `generated - 1` tokens take
// eval_seconds.
#pragma once

#include <cstdint>
#include <optional>

#include "infllm/model/model.h"
#include "infllm/ops/sparse_config.h"

namespace infllm::engine {

// Keys that were attended to, and keys at or before the token, summed over tokens.
struct Visibility {
  double attended = 0;
  double causal = 0;

  double share() const { return causal > 0 ? attended / causal : 1; }
  // Tokens at positions [from, to); `sparse` is null for dense ones.
  void add(std::int32_t from, std::int32_t to, const SparseConfig* sparse);
};

struct Timings {
  std::int32_t prompt_tokens = 0;     // the whole prompt,
  std::int32_t reused_tokens = 0;     // of which so many were in the cache
  std::int32_t generated_tokens = 0;  // the end-of-sequence token not counted
  double wait_seconds = 0;            // before it was its turn
  double prompt_seconds = 0;          // from there to the first token: time to first token
  double eval_seconds = 0;            // from the first token to the end
  Visibility prompt_visible, eval_visible;
  // Of all steps this request took part in, its neighbours' share included.
  model::ForwardTimes prompt_times, eval_times;

  std::int32_t prompt_computed() const { return prompt_tokens - reused_tokens; }
  std::int32_t eval_tokens() const { return generated_tokens > 0 ? generated_tokens - 1 : 0; }
};

// into += times.
void accumulate(const model::ForwardTimes& times, model::ForwardTimes& into);

}  // namespace infllm::engine
