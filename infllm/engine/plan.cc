// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/plan.h"

#include <algorithm>

#include "infllm/ops/kernels.h"

namespace infllm::engine {
namespace {

// Places of the arrays in the one buffer, in elements of four bytes; `sparse` holds bytes.
struct Places {
  std::int64_t query_start, kv_length, token_ids, positions, lengths, logit_rows, temperatures,
      sparse, page_table, end;
};

Places places(std::int64_t sequences, std::int64_t tokens, std::int64_t pages) {
  Places p{};
  p.query_start = 0;
  p.kv_length = p.query_start + sequences + 1;
  p.token_ids = p.kv_length + sequences;
  p.positions = p.token_ids + tokens;
  p.lengths = p.positions + tokens;
  p.logit_rows = p.lengths + tokens;
  p.temperatures = p.logit_rows + sequences;
  p.sparse = p.temperatures + sequences;
  p.page_table = p.sparse + ceil_div(sequences, sizeof(std::int32_t));
  p.end = p.page_table + sequences * pages;
  return p;
}

// The arrays at `base`, which may be the staging copy or the backend's.
Batch with_arrays(Batch batch, const std::int32_t* base, const Places& at) {
  batch.query_start = base + at.query_start;
  batch.kv_length = base + at.kv_length;
  batch.page_table = base + at.page_table;
  batch.sparse = reinterpret_cast<const std::uint8_t*>(base + at.sparse);
  return batch;
}

// The numbers of the step that the host keeps, as the work has them.
Batch count(std::span<const Work> work, const KvPool& pool) {
  Batch batch;
  batch.num_sequences = static_cast<std::int32_t>(work.size());
  for (const Work& item : work) {
    batch.num_tokens += item.tokens;
    batch.max_query_length = std::max(batch.max_query_length, item.tokens);
    batch.max_kv_length = std::max(batch.max_kv_length, item.sequence->cached + item.tokens);
  }
  batch.max_pages = static_cast<std::int32_t>(pool.pages_for(batch.max_kv_length));
  return batch;
}

bool decodes_only(std::span<const Work> work) {
  return std::ranges::all_of(
      work, [](const Work& item) { return item.tokens == 1 && item.wants_logits(); });
}

}  // namespace

std::int64_t Plan::bytes(const PlanLimits& limits) {
  return places(limits.max_sequences, limits.max_tokens, limits.max_pages).end *
         static_cast<std::int64_t>(sizeof(std::int32_t));
}

Result<Plan> Plan::create(const Backend& backend, const PlanLimits& limits) {
  Plan plan;
  plan.backend_ = backend;
  plan.limits_ = limits;
  plan.device_ = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(bytes(limits))));
  return plan;
}

Status Plan::build(std::span<const Work> work, const ModeRule& rule, const KvPool& pool) {
  Batch batch = count(work, pool);
  INFLLM_CHECK(batch.num_sequences <= limits_.max_sequences &&
                   batch.num_tokens <= limits_.max_tokens && batch.max_pages <= limits_.max_pages &&
                   batch.max_kv_length <= limits_.max_kv_length,
               "a step larger than the plan's limits");
  repeatable_ = backend_.kernels->record != nullptr && decodes_only(work);
  if (repeatable_) {
    batch.max_pages = limits_.max_pages;
    batch.max_kv_length = limits_.max_kv_length;
  }

  const Places at = places(batch.num_sequences, batch.num_tokens, batch.max_pages);
  staging_.assign(at.end, 0);
  modes_.clear();
  num_logits_ = 0;
  auto* sparse = reinterpret_cast<std::uint8_t*>(staging_.data() + at.sparse);
  auto* temperatures = reinterpret_cast<float*>(staging_.data() + at.temperatures);
  for (std::int32_t b = 0; b < batch.num_sequences; ++b) {
    const Sequence& sequence = *work[b].sequence;
    const std::int32_t start = staging_[at.query_start + b];
    const std::int32_t end = start + work[b].tokens;
    const std::int32_t kv_length = sequence.cached + work[b].tokens;
    const std::int32_t length = sequence.deciding_length(work[b].tokens);
    staging_[at.query_start + b + 1] = end;
    staging_[at.kv_length + b] = kv_length;
    std::copy_n(sequence.tokens.begin() + sequence.cached, work[b].tokens,
                staging_.begin() + at.token_ids + start);
    for (std::int32_t i = 0; i < work[b].tokens; ++i) {
      staging_[at.positions + start + i] = sequence.cached + i;
      staging_[at.lengths + start + i] = length;
    }
    std::copy_n(sequence.pages.begin(), pool.pages_for(kv_length),
                staging_.begin() + at.page_table + std::int64_t{b} * batch.max_pages);
    if (work[b].wants_logits()) {
      staging_[at.logit_rows + num_logits_] = end - 1;
      temperatures[num_logits_++] = work[b].temperature;
    }
    modes_.push_back(rule.at(length));
    sparse[b] = modes_.back().sparse ? 1 : 0;
    batch.any_sparse |= modes_.back().sparse;
  }

  INFLLM_TRY(check_contents(with_arrays(batch, staging_.data(), at), pool.page_tokens(),
                            pool.total_pages()));
  INFLLM_TRY(
      copy_in(backend_, device_.data(), staging_.data(), staging_.size() * sizeof(std::int32_t)));
  const auto* base = device_.as<const std::int32_t>();
  batch_ = with_arrays(batch, base, at);
  token_ids_ = base + at.token_ids;
  positions_ = base + at.positions;
  lengths_ = base + at.lengths;
  logit_rows_ = num_logits_ < batch.num_tokens ? base + at.logit_rows : nullptr;
  temperatures_ = reinterpret_cast<const float*>(base + at.temperatures);
  return {};
}

}  // namespace infllm::engine
