// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/sequence.h"

#include <algorithm>

namespace infllm::engine {

void Sequence::advance(std::int32_t count, Mode mode) {
  if (cached == 0) first_mode = mode;
  if (in_first_mode == cached && mode == first_mode) in_first_mode += count;
  cached += count;
}

void Sequence::truncate(std::int32_t count, KvPool& pool) {
  cached = std::min(cached, count);
  in_first_mode = std::min(in_first_mode, cached);
  tokens.resize(cached);
  pool.shrink(pages, cached);
}

void Sequence::restart(std::span<const std::int32_t> prompt, const ModeRule& rule, KvPool& pool) {
  truncate(reusable_prefix(*this, prompt, rule), pool);
  tokens.assign(prompt.begin(), prompt.end());
  prompt_length = length();
}

std::int32_t reusable_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                             const ModeRule& rule) {
  const auto length = static_cast<std::int32_t>(prompt.size());
  if (length == 0 || sequence.first_mode != rule.at(length)) return 0;
  const std::int32_t limit = std::min(sequence.in_first_mode, length - 1);
  const auto begin = sequence.tokens.begin();
  return static_cast<std::int32_t>(std::mismatch(begin, begin + limit, prompt.begin()).first -
                                   begin);
}

}  // namespace infllm::engine
