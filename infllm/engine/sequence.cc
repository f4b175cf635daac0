// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/sequence.h"

#include <algorithm>

namespace infllm::engine {
namespace {

// Of the first `limit` tokens of the sequence, how many begin the prompt; never all of it.
std::int32_t common_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                           std::int32_t limit) {
  limit = std::min(limit, static_cast<std::int32_t>(prompt.size()) - 1);
  const auto begin = sequence.tokens.begin();
  return static_cast<std::int32_t>(std::mismatch(begin, begin + limit, prompt.begin()).first -
                                   begin);
}

}  // namespace

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

void Sequence::fork(const Sequence& source, std::span<const std::int32_t> prompt,
                    const ModeRule& rule, KvPool& pool) {
  truncate(0, pool);
  cached = in_first_mode = reusable_prefix(source, prompt, rule);
  first_mode = source.first_mode;
  pages =
      pool.share(std::span(source.pages).first(static_cast<std::size_t>(pool.pages_for(cached))));
  tokens.assign(prompt.begin(), prompt.end());
  prompt_length = length();
}

std::int32_t reusable_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                             const ModeRule& rule) {
  if (prompt.empty() || sequence.first_mode != rule.at(std::ssize(prompt))) return 0;
  return common_prefix(sequence, prompt, sequence.in_first_mode);
}

std::int32_t coming_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                           const ModeRule& rule) {
  if (prompt.empty() || rule.at(sequence.prompt_length) != rule.at(std::ssize(prompt))) return 0;
  return common_prefix(sequence, prompt, sequence.prompt_length);
}

}  // namespace infllm::engine
