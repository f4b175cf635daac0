// SPDX-License-Identifier: Apache-2.0
//
// The best logits of each row, so that a sampler need not copy the whole vocabulary from a device:
//
//   token, logit   the `count` largest, best first, of equals the smaller id first: kMost of them,
//                  or as many as are allowed; one where the temperature is 0
//   weight         sum over the row of exp((l - largest) / temperature), with which a sampler knows
//                  what share of the probability it sees; 0 when the temperature is 0
//
//   top_logits(backend, {.rows = 2, .vocabulary = V, .logits = logits, .temperatures = t,
//                        .out = out}, workspace);
//
// Minus infinity forbids a token: it is never among the best. A NaN or plus infinity makes the row
// worthless; `broken` then names such a token. `weight` is computed in float32, good to 1e-5 of its
// value: a draw by top_p differs from one over the whole row once in some 100,000.
//
// A column may lack this cell: its caller reads whole rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/core/status.h"

namespace infllm {

struct Backend;

struct TopLogits {
  static constexpr std::int32_t kMost = 256;

  double weight = 0;
  std::int32_t count = 0;
  std::int32_t broken = -1;  // a token whose logit is NaN or plus infinity
  float logit[kMost];
  std::int32_t token[kMost];
};

struct TopLogitsParams {
  std::int64_t rows = 0;
  std::int64_t vocabulary = 0;
  const void* logits = nullptr;         // [rows, V] activation type
  const float* temperatures = nullptr;  // [rows] not negative
  TopLogits* out = nullptr;             // [rows] backend's memory
};

Status top_logits(const Backend& backend, const TopLogitsParams& params,
                  std::span<std::byte> workspace);
std::size_t top_logits_workspace_bytes(const Backend& backend, const TopLogitsParams& params);

}  // namespace infllm
