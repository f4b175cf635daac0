// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cpu/choosers.h"

#include <algorithm>

#include "infllm/ops/kernels.h"

namespace infllm::cpu {
namespace {

// Whoever chose among the blocks up to the token's own: visit(token, block), descending tokens.
template <typename Visit>
void for_each_choice(const AttendParams& p, const Sequence& sequence, std::int64_t head,
                     Visit&& visit) {
  for (std::int32_t i = sequence.tokens - 1; i >= 0; --i) {
    const std::int64_t token = std::int64_t{sequence.first_token} + i;
    const std::int64_t own = (sequence.first_position() + i) / kPageTokens;
    const std::int32_t* row = p.selection + (head * p.batch.num_tokens + token) * p.columns;
    for (std::int32_t j = 0; j < p.columns && row[j] >= 0 && row[j] <= own; ++j) {
      visit(static_cast<std::int32_t>(token), row[j]);
    }
  }
}

bool has_lists(const AttendParams& params) {
  return params.selection != nullptr && params.batch.any_sparse;
}

}  // namespace

Choosers Choosers::of_selection(const Backend& backend, const AttendParams& params, Arena& arena) {
  Choosers choosers;
  if (!has_lists(params)) return choosers;
  const std::int64_t heads = params.pages.layout.kv_heads;
  const std::int64_t blocks = ceil_div(params.batch.max_kv_length, kPageTokens);
  const std::int64_t pairs = params.batch.num_sequences * heads;
  choosers.heads_kv_ = heads;
  choosers.blocks_ = blocks;
  choosers.starts_ = arena.take<std::int64_t>(pairs * (blocks + 1));
  choosers.tokens_ =
      arena.take<std::int32_t>(heads * params.batch.num_tokens * std::int64_t{params.columns});
  backend.pool->parallel_for(pairs, [&](std::int64_t pair, int) {
    const auto index = static_cast<std::int32_t>(pair / heads);
    const std::int64_t head = pair % heads;
    const Sequence sequence(params.pages, params.batch, index);
    if (!sequence.sparse) return;
    std::int64_t* start = choosers.starts_ + pair * (blocks + 1);
    std::fill_n(start, blocks + 1, std::int64_t{0});
    for_each_choice(params, sequence, head,
                    [&](std::int32_t, std::int32_t block) { ++start[block]; });
    // start[b] = the end of b's list; filling from the back makes it the beginning.
    std::int64_t end = (head * params.batch.num_tokens + sequence.first_token) * params.columns;
    for (std::int64_t b = 0; b < blocks; ++b) end = start[b] += end;
    start[blocks] = end;
    for_each_choice(params, sequence, head, [&](std::int32_t token, std::int32_t block) {
      choosers.tokens_[--start[block]] = token;
    });
  });
  return choosers;
}

void Choosers::take(const AttendParams& params, ArenaSize& size) {
  if (!has_lists(params)) return;
  const std::int64_t heads = params.pages.layout.kv_heads;
  const std::int64_t blocks = ceil_div(params.batch.max_kv_length, kPageTokens);
  size.take<std::int64_t>(params.batch.num_sequences * heads * (blocks + 1));
  size.take<std::int32_t>(heads * params.batch.num_tokens * std::int64_t{params.columns});
}

}  // namespace infllm::cpu
