// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/scheduler.h"

#include <algorithm>

namespace infllm::engine {
namespace {

// The largest chunk of at most `limit` tokens that finishes the prompt or ends at a block's border;
// `limit` itself when no border lies within.
std::int32_t chunk(const Pending& sequence, std::int32_t limit, std::int32_t block_size) {
  if (sequence.uncached <= limit) return sequence.uncached;
  const std::int32_t past_border = (sequence.cached + limit) % block_size;
  return past_border < limit ? limit - past_border : limit;
}

}  // namespace

std::vector<std::int32_t> schedule(std::span<const Pending> running,
                                   const SchedulerOptions& options) {
  std::vector<std::int32_t> tokens(running.size(), 0);
  std::int32_t prompts = 0;
  for (std::size_t i = 0; i < running.size(); ++i) {
    if (running[i].uncached == 1) {
      tokens[i] = 1;
    } else {
      ++prompts;
    }
  }
  if (prompts == 0) return tokens;

  std::int32_t budget = std::max(1, options.chunk_tokens);
  const std::int32_t share = std::max(options.block_size, budget / prompts);
  for (std::size_t i = 0; i < running.size() && budget > 0; ++i) {
    if (running[i].uncached == 1) continue;
    tokens[i] = chunk(running[i], std::min(share, budget), options.block_size);
    budget -= tokens[i];
  }
  // What rounding and short prompts left over.
  for (std::size_t i = 0; i < running.size() && budget > 0; ++i) {
    if (running[i].uncached == 1 || tokens[i] == 0) continue;
    const std::int32_t more = chunk(running[i], tokens[i] + budget, options.block_size);
    if (more <= tokens[i]) continue;
    budget -= more - tokens[i];
    tokens[i] = more;
  }
  return tokens;
}

}  // namespace infllm::engine
