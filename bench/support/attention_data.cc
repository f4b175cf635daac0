// SPDX-License-Identifier: Apache-2.0
#include "bench/support/attention_data.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infllm/ops/compress.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/overlap.h"
#include "infllm/ops/score.h"
#include "infllm/ops/select.h"

namespace infllm::bench {
namespace {

constexpr std::int64_t kFillTokens = 1024;  // appended at once
constexpr int kTopicTokens = 16;
constexpr float kTopicShare = 0.6f;  // of a key's variance
constexpr float kQueryScale = 2.0f;  // logits with a spread of about 2, as trained heads have
constexpr std::int64_t kOverlapTokens = 64;
constexpr std::int64_t kFreshTokens = 65536;  // of many_queries

float scale_of(const AttentionShape& shape) {
  return 1 / std::sqrt(static_cast<float>(shape.head_dim));
}

// Host floats as `dtype`, in `bytes`.
template <typename T>
void narrow(std::span<const float> values, std::byte* bytes) {
  auto* out = reinterpret_cast<T*>(bytes);
  for (std::size_t i = 0; i < values.size(); ++i) out[i] = T(values[i]);
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

Status upload_to(const Backend& backend, void* to, std::span<const float> values) {
  const DType dtype = backend.kernels->activation;
  if (dtype == DType::kF32) return copy_in(backend, to, values.data(), values.size_bytes());
  std::vector<std::byte> bytes(values.size() * static_cast<std::size_t>(size_of(dtype)));
  if (dtype == DType::kF64) {
    narrow<double>(values, bytes.data());
  } else if (dtype == DType::kF16) {
    narrow<F16>(values, bytes.data());
  } else {
    narrow<BF16>(values, bytes.data());
  }
  return copy_in(backend, to, bytes.data(), bytes.size());
}

Result<Buffer> upload(const Backend& backend, std::span<const float> values) {
  const auto element = static_cast<std::size_t>(size_of(backend.kernels->activation));
  Buffer buffer = INFLLM_TRY(allocate(backend, values.size() * element));
  INFLLM_TRY(upload_to(backend, buffer.data(), values));
  return buffer;
}

Result<Layer> Layer::create(const Backend& backend, const AttentionShape& shape,
                            const SparseConfig& config, DType dtype, std::int64_t tokens,
                            std::uint64_t seed, std::int32_t sequences) {
  Layer layer;
  layer.backend_ = backend;
  layer.sequences_ = sequences;
  const KvLayout layout{.dtype = dtype,
                        .kv_heads = shape.heads_kv,
                        .head_dim = shape.head_dim,
                        .pooled_keys = true,
                        .config = config};
  INFLLM_TRY(check(backend, layout));
  layer.blocks_ = static_cast<std::int32_t>(config.blocks_in(tokens));
  const std::int32_t num_pages = sequences * layer.blocks_;
  const std::int64_t page_bytes = kv_page_bytes(backend, layout);
  layer.buffer_ = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(num_pages * page_bytes)));
  layer.pages_ = {layer.buffer_.data(), layout, page_bytes, num_pages};
  std::vector<std::int32_t> table(static_cast<std::size_t>(num_pages));
  std::iota(table.begin(), table.end(), 0);
  const std::size_t table_bytes = table.size() * sizeof(table[0]);
  layer.page_table_ = INFLLM_TRY(allocate(backend, table_bytes));
  INFLLM_TRY(copy_in(backend, layer.page_table_.data(), table.data(), table_bytes));

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
    const Buffer keys = INFLLM_TRY(upload(backend, k));
    const Buffer values = INFLLM_TRY(upload(backend, v));
    for (std::int32_t b = 0; b < sequences; ++b) {
      const Batch batch = INFLLM_TRY(layer.step_of(b, 1, first + count, count, false));
      INFLLM_TRY(kv_append(backend, {layer.pages_, batch, keys.data(), values.data()}));
      INFLLM_TRY(compress(backend, {layer.pages_, batch}));
    }
    INFLLM_TRY(synchronize(backend));  // before keys and values go
  }
  return layer;
}

Result<Batch> Layer::step(std::int64_t length, std::int64_t count, bool sparse) {
  return step_of(0, sequences_, length, count, sparse);
}

Result<Batch> Layer::step_of(std::int32_t first, std::int32_t sequences, std::int64_t length,
                             std::int64_t count, bool sparse) {
  // [B + 1] starts, [B] lengths, [B] flags.
  const auto size = static_cast<std::size_t>(sequences);
  std::vector<std::int32_t> plan(2 * size + 1 + (size + 3) / 4);
  for (std::int32_t b = 0; b <= sequences; ++b) plan[b] = static_cast<std::int32_t>(b * count);
  std::fill_n(plan.begin() + sequences + 1, size, static_cast<std::int32_t>(length));
  auto* flags = reinterpret_cast<std::uint8_t*>(plan.data() + 2 * size + 1);
  std::fill_n(flags, size, static_cast<std::uint8_t>(sparse));
  const std::size_t bytes = plan.size() * sizeof(plan[0]);
  if (plan_.bytes() < bytes) plan_ = INFLLM_TRY(allocate(backend_, bytes));
  INFLLM_TRY(copy_in(backend_, plan_.data(), plan.data(), bytes));
  const auto* base = plan_.as<std::int32_t>();
  return Batch{.num_sequences = sequences,
               .num_tokens = static_cast<std::int32_t>(sequences * count),
               .query_start = base,
               .kv_length = base + size + 1,
               .page_table = page_table_.as<std::int32_t>() + std::int64_t{first} * blocks_,
               .max_pages = blocks_,
               .sparse = reinterpret_cast<const std::uint8_t*>(base + 2 * size + 1),
               .any_sparse = sparse,
               .max_query_length = static_cast<std::int32_t>(count),
               .max_kv_length = static_cast<std::int32_t>(length)};
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

Result<Buffer> many_queries(const Backend& backend, const AttentionShape& shape, double correlation,
                            std::int64_t tokens, std::uint64_t seed) {
  const std::int64_t row = std::int64_t{shape.heads_q} * shape.head_dim;
  const std::int64_t element = size_of(backend.kernels->activation);
  std::vector<float> q(static_cast<std::size_t>(std::min(tokens, kFreshTokens) * row));
  Queries(shape, correlation, seed).fill(q);
  Buffer buffer = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(tokens * row * element)));
  for (std::int64_t first = 0; first < tokens; first += kFreshTokens) {
    const std::int64_t count = std::min(tokens - first, kFreshTokens) * row;
    INFLLM_TRY(upload_to(backend, buffer.data() + first * row * element,
                         std::span<const float>(q).first(static_cast<std::size_t>(count))));
  }
  return buffer;
}

Result<Chooser> Chooser::create(const Backend& backend, const AttentionShape& shape,
                                const SparseConfig& config, const KvPages& pages,
                                const Batch& batch) {
  Chooser c;
  c.params_.score = {.pages = pages,
                     .batch = batch,
                     .config = config,
                     .heads_q = shape.heads_q,
                     .scale = scale_of(shape)};
  c.params_.select = {.batch = batch, .config = config, .heads_kv = shape.heads_kv};
  const std::int64_t rows = std::int64_t{shape.heads_kv} * batch.num_tokens;
  c.selection_ = INFLLM_TRY(
      allocate(backend, static_cast<std::size_t>(rows * c.columns()) * sizeof(std::int32_t)));
  c.params_.select.selection = c.selection_.as<std::int32_t>();
  c.fused_ = has_score_select(backend, c.params_);
  if (!c.fused_) {
    c.scores_ = INFLLM_TRY(
        allocate(backend, static_cast<std::size_t>(rows * c.params_.select.blocks() *
                                                   size_of(backend.kernels->accumulate))));
    c.params_.score.scores = c.scores_.data();
    c.params_.select.scores = c.scores_.data();
  }
  c.workspace_ =
      INFLLM_TRY(allocate(backend, c.fused_ ? score_select_workspace_bytes(backend, c.params_)
                                            : score_workspace_bytes(backend, c.params_.score)));
  return c;
}

Status Chooser::run(const Backend& backend, const void* q) {
  params_.score.q = q;
  const std::span<std::byte> workspace(workspace_.data(), workspace_.bytes());
  if (fused_) return score_select(backend, params_, workspace);
  INFLLM_TRY(score(backend, params_.score, workspace));
  return select(backend, params_.select);
}

Result<std::vector<std::int32_t>> Chooser::read(const Backend& backend) const {
  std::vector<std::int32_t> chosen(selection_.bytes() / sizeof(std::int32_t));
  INFLLM_TRY(copy_out(backend, chosen.data(), selection_.data(), selection_.bytes()));
  return chosen;
}

Result<double> measure_overlap(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double correlation) {
  const Batch batch = INFLLM_TRY(layer.step(length, kOverlapTokens, true));
  std::vector<float> values(static_cast<std::size_t>(kOverlapTokens) * shape.heads_q *
                            shape.head_dim);
  Queries(shape, correlation, 7).fill(values);
  const Buffer q = INFLLM_TRY(upload(backend, values));
  Chooser chooser = INFLLM_TRY(Chooser::create(backend, shape, config, layer.pages(), batch));
  INFLLM_TRY(chooser.run(backend, q.data()));
  const std::vector<std::int32_t> selection = INFLLM_TRY(chooser.read(backend));
  return neighbours_overlap(config, selection, shape.heads_kv, kOverlapTokens, chooser.columns(),
                            length);
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
