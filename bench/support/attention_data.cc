// SPDX-License-Identifier: Apache-2.0
#include "bench/support/attention_data.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infllm/ops/compress.h"
#include "infllm/ops/score.h"
#include "infllm/ops/select.h"

namespace infllm::bench {
namespace {

constexpr std::int64_t kFillTokens = 1024;  // appended at once
constexpr int kTopicTokens = 16;
constexpr float kTopicShare = 0.6f;  // of a key's variance
constexpr float kQueryScale = 2.0f;  // logits with a spread of about 2, as trained heads have
constexpr std::int64_t kOverlapTokens = 64;

float scale_of(const AttentionShape& shape) {
  return 1 / std::sqrt(static_cast<float>(shape.head_dim));
}

}  // namespace

float Noise::next() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  const auto part = [&](int shift) { return static_cast<int>((state_ >> shift) & 0xffff); };
  // Variance of a uniform 16-bit number: 65536^2 / 12.
  constexpr float kScale = 1.7320508f / 65536;
  return static_cast<float>(part(0) + part(16) + part(32) + part(48) - 2 * 65535) * kScale;
}

Result<Layer> Layer::create(const Backend& backend, const AttentionShape& shape,
                            const SparseConfig& config, DType dtype, std::int64_t tokens,
                            std::uint64_t seed) {
  Layer layer;
  const KvLayout layout{.dtype = dtype,
                        .kv_heads = shape.heads_kv,
                        .head_dim = shape.head_dim,
                        .pooled_keys = true,
                        .config = config};
  const auto num_pages = static_cast<std::int32_t>(config.blocks_in(tokens));
  const std::int64_t page_bytes = kv_page_bytes(backend, layout);
  layer.buffer_ = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(num_pages * page_bytes)));
  layer.pages_ = {layer.buffer_.data(), layout, page_bytes, num_pages};
  layer.page_table_.resize(static_cast<std::size_t>(num_pages));
  std::iota(layer.page_table_.begin(), layer.page_table_.end(), 0);

  const std::size_t row = static_cast<std::size_t>(shape.heads_kv) * shape.head_dim;
  std::vector<float> k(kFillTokens * row);
  std::vector<float> v(k.size());
  std::vector<float> topic(row);
  Noise noise(seed);
  const float own = std::sqrt(1 - kTopicShare);
  for (std::int64_t first = 0; first < tokens; first += kFillTokens) {
    const std::int64_t count = std::min(kFillTokens, tokens - first);
    for (std::size_t i = 0; i < static_cast<std::size_t>(count) * row; ++i) {
      if (i % (kTopicTokens * row) < row) topic[i % row] = std::sqrt(kTopicShare) * noise.next();
      k[i] = topic[i % row] + own * noise.next();
      v[i] = noise.next();
    }
    const Batch& batch = layer.step(first + count, count, false);
    INFLLM_TRY(kv_append(backend, {layer.pages_, batch, k.data(), v.data()}));
    INFLLM_TRY(compress(backend, {layer.pages_, batch}));
  }
  return layer;
}

const Batch& Layer::step(std::int64_t length, std::int64_t count, bool sparse) {
  query_start_[1] = static_cast<std::int32_t>(count);
  kv_length_ = static_cast<std::int32_t>(length);
  sparse_ = sparse;
  batch_ = {.num_sequences = 1,
            .num_tokens = static_cast<std::int32_t>(count),
            .query_start = query_start_,
            .kv_length = &kv_length_,
            .page_table = page_table_.data(),
            .max_pages = static_cast<std::int32_t>(page_table_.size()),
            .sparse = &sparse_,
            .any_sparse = sparse,
            .max_query_length = static_cast<std::int32_t>(count),
            .max_kv_length = kv_length_};
  return batch_;
}

Queries::Queries(const AttentionShape& shape, double correlation, std::uint64_t seed)
    : noise_(seed),
      keep_(static_cast<float>(correlation)),
      fresh_(static_cast<float>(std::sqrt(1 - correlation * correlation))),
      last_(static_cast<std::size_t>(shape.heads_q) * shape.head_dim) {
  for (float& x : last_) x = kQueryScale * noise_.next();
}

void Queries::fill(std::span<float> q) {
  for (std::size_t i = 0; i < q.size(); ++i) {
    float& last = last_[i % last_.size()];
    last = keep_ * last + fresh_ * kQueryScale * noise_.next();
    q[i] = last;
  }
}

Result<double> measure_overlap(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double correlation) {
  const Batch& batch = layer.step(length, kOverlapTokens, true);
  std::vector<float> q(static_cast<std::size_t>(kOverlapTokens) * shape.heads_q * shape.head_dim);
  Queries(shape, correlation, 7).fill(q);
  SelectParams select_params{.batch = batch, .config = config, .heads_kv = shape.heads_kv};
  const std::int64_t rows = shape.heads_kv * kOverlapTokens;
  std::vector<float> scores(static_cast<std::size_t>(rows * select_params.blocks()));
  std::vector<std::int32_t> selection(static_cast<std::size_t>(rows * select_params.columns()));
  const ScoreParams score_params{layer.pages(),   batch,    config,       shape.heads_q,
                                 scale_of(shape), q.data(), scores.data()};
  std::vector<std::byte> workspace(score_workspace_bytes(backend, score_params));
  INFLLM_TRY(score(backend, score_params, workspace));
  select_params.scores = scores.data();
  select_params.selection = selection.data();
  INFLLM_TRY(select(backend, select_params));

  const std::int64_t columns = select_params.columns();
  std::int64_t common = 0;
  std::int64_t total = 0;
  for (std::int64_t row = 1; row < rows; ++row) {
    if (row % kOverlapTokens == 0) continue;  // another head
    const std::int64_t local =
        config.first_local_block(length - kOverlapTokens + row % kOverlapTokens);
    const auto free = [&](std::int64_t r) {
      const auto* begin = selection.data() + r * columns;
      return std::span(begin + config.init_blocks, std::lower_bound(begin, begin + columns, local));
    };
    std::vector<std::int32_t> both;
    std::ranges::set_intersection(free(row - 1), free(row), std::back_inserter(both));
    common += static_cast<std::int64_t>(both.size());
    total += static_cast<std::int64_t>(free(row).size());
  }
  return total == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(total);
}

Result<double> correlation_for(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double overlap) {
  double low = 0;
  double high = 1;
  for (int step = 0; step < 12; ++step) {
    const double middle = (low + high) / 2;
    const double got = INFLLM_TRY(measure_overlap(backend, shape, config, layer, length, middle));
    (got < overlap ? low : high) = middle;
  }
  return (low + high) / 2;
}

}  // namespace infllm::bench
