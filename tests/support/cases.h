// SPDX-License-Identifier: Apache-2.0
//
// The shapes that every step of attention is tested on, in one list: every edge of the algorithm
// has a case here, named after it. A case is a set of sequences and a schedule; most cases prefill
// a history without looking and then examine one step.
//
// Configurations are scaled down (a budget of 6 blocks instead of 96), so that a few hundred tokens
// exercise selection; two cases use the released numbers beyond 6144 tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "infllm/ops/sparse_config.h"

namespace infllm::testing {

// What the keys and queries look like.
enum class Content {
  kNatural,  // normal values with a theme for every 64 tokens, so that blocks differ
  kZero,     // q = 0: every score ties
  kTies,     // keys repeat every 64 tokens: blocks tie, but for rounding
  kExtreme,  // large logits: exp must neither overflow into NaN nor lose the order
};

// Tokens first .. end - 1 of one sequence run in a step.
struct Span {
  std::int32_t first = 0;
  std::int32_t end = 0;
};

// One span for each sequence; a sequence that sits a step out repeats its end: {end, end}.
using Step = std::vector<Span>;

struct Case {
  std::string name;  // a C++ identifier
  SparseConfig config;
  std::int32_t heads_q = 4;
  std::int32_t heads_kv = 2;
  std::int32_t head_dim = 64;
  std::vector<Step> steps;
  Content content = Content::kNatural;
  std::uint64_t seed = 1;

  std::int32_t group() const { return heads_q / heads_kv; }
  std::int32_t sequences() const { return static_cast<std::int32_t>(steps.front().size()); }
  std::int32_t length(std::int32_t sequence) const {
    std::int32_t longest = 0;
    for (const Step& step : steps) longest = std::max(longest, step[sequence].end);
    return longest;
  }
};

const std::vector<Case>& cases();
// The one of that name; asking for another one is a mistake of the test.
const Case& case_named(const std::string& name);

// W = 2 blocks of local window besides the own block, a budget of T = 6 blocks = 384 tokens, always
// sparse.
SparseConfig small_config();

}  // namespace infllm::testing
