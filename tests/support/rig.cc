// SPDX-License-Identifier: Apache-2.0
#include "tests/support/rig.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "infllm/backend/open.h"
#include "infllm/backend/reference/pages.h"
#include "infllm/backend/reference/rounding.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/score_select.h"

namespace infllm::testing {
namespace {

constexpr std::int32_t kNoPage = INT32_MAX;  // behind the end of a sequence

Buffer workspace_of(const Backend& backend, std::size_t bytes) {
  return must(allocate(backend, bytes));
}

std::span<std::byte> span_of(const Buffer& buffer) { return {buffer.data(), buffer.bytes()}; }

}  // namespace

Backend open(const std::string& name, int threads) {
  return must(open_backend(name, {.threads = threads}));
}

Backend open_rounded(DType operand, DType output, int threads) {
  Backend backend = open("reference", threads);
  backend.state = std::make_shared<reference::Rounding>(
      reference::Rounding{.operand = operand, .output = output});
  return backend;
}

DType numbers_type(const Backend& backend) {
  const DType activation = backend.kernels->activation;
  return size_of(activation) == 2 ? activation : DType::kF32;
}

Rig::Rig(Backend backend, const Case& c, DType kv_dtype, DType numbers)
    : backend_(std::move(backend)),
      case_(c),
      numbers_type_(numbers),
      numbers_(numbers_of(c, numbers)),
      scale_(static_cast<float>(1 / std::sqrt(static_cast<double>(c.head_dim)))),
      cached_(static_cast<std::size_t>(c.sequences()), 0) {
  const KvLayout layout{
      .dtype = kv_dtype, .kv_heads = c.heads_kv, .head_dim = c.head_dim, .config = c.config};
  must(check(backend_, layout));
  std::int64_t longest = 0;
  std::int64_t total = 0;
  for (std::int32_t s = 0; s < c.sequences(); ++s) {
    const std::int64_t pages = c.config.blocks_in(c.length(s));
    longest = std::max(longest, pages);
    total += pages;
  }
  const std::int64_t max_pages = longest + 2;
  const auto num_pages = static_cast<std::int32_t>(total + 3);

  // Hands out pages in random order.
  std::vector<std::int32_t> free(static_cast<std::size_t>(num_pages));
  for (std::int32_t i = 0; i < num_pages; ++i) free[i] = i;
  Random random(c.seed + 1000);
  for (std::int32_t i = num_pages - 1; i > 0; --i) std::swap(free[i], free[random.below(i + 1)]);
  page_table_.assign(static_cast<std::size_t>(c.sequences() * max_pages), kNoPage);
  for (std::int32_t s = 0; s < c.sequences(); ++s) {
    for (std::int64_t i = 0; i < c.config.blocks_in(c.length(s)); ++i) {
      page_table_[s * max_pages + i] = free.back();
      free.pop_back();
    }
  }
  batch_.max_pages = static_cast<std::int32_t>(max_pages);
  table_memory_ = upload(backend_, page_table_);

  const std::int64_t page_bytes = kv_page_bytes(backend_, layout);
  const std::vector<std::byte> nan(static_cast<std::size_t>(page_bytes * num_pages),
                                   std::byte{0xff});  // is NaN in every floating-point type
  page_memory_ = must(allocate(backend_, nan.size()));
  must(copy_in(backend_, page_memory_.data(), nan.data(), nan.size()));
  pages_ = {page_memory_.data(), layout, page_bytes, num_pages};
}

void Rig::upload_page_table() {
  must(copy_in(backend_, table_memory_.data(), page_table_.data(),
               page_table_.size() * sizeof(std::int32_t)));
}

void Rig::enter(const Step& step) {
  Step history;
  bool missing = false;
  for (std::size_t s = 0; s < step.size(); ++s) {
    const std::int32_t first = std::min(cached_[s], step[s].first);
    history.push_back({first, step[s].first});
    missing |= first < step[s].first;
  }
  if (missing) run(history);
  run(step);
}

void Rig::run(const Step& step) {
  step_ = step;
  const auto sequences = static_cast<std::int32_t>(step.size());
  std::vector<std::int32_t> starts = {0};
  std::vector<std::int32_t> lengths;
  std::vector<std::uint8_t> sparse;
  positions_.clear();
  token_sparse_.clear();
  batch_.num_sequences = sequences;
  batch_.any_sparse = false;
  batch_.max_query_length = 0;
  batch_.max_kv_length = 0;
  for (std::int32_t s = 0; s < sequences; ++s) {
    const std::int32_t tokens = step[s].end - step[s].first;
    cached_[s] = step[s].end;
    starts.push_back(starts.back() + tokens);
    lengths.push_back(step[s].end);
    sparse.push_back(case_.config.is_sparse_at(step[s].end) ? 1 : 0);
    batch_.any_sparse |= sparse.back() != 0;
    batch_.max_query_length = std::max(batch_.max_query_length, tokens);
    batch_.max_kv_length = std::max(batch_.max_kv_length, step[s].end);
    for (std::int32_t t = step[s].first; t < step[s].end; ++t) {
      positions_.push_back(t);
      token_sparse_.push_back(sparse.back() != 0);
    }
  }
  batch_.num_tokens = starts.back();
  starts_memory_ = upload(backend_, starts);
  lengths_memory_ = upload(backend_, lengths);
  sparse_memory_ = must(allocate(backend_, sparse.size()));
  must(copy_in(backend_, sparse_memory_.data(), sparse.data(), sparse.size()));
  batch_.query_start = starts_memory_.as<std::int32_t>();
  batch_.kv_length = lengths_memory_.as<std::int32_t>();
  batch_.page_table = table_memory_.as<std::int32_t>();
  batch_.sparse = sparse_memory_.as<std::uint8_t>();

  const Buffer k = key_rows(&SequenceNumbers::k);
  const Buffer v = key_rows(&SequenceNumbers::v);
  Buffer k_score;
  if (case_.config.use_nope) k_score = key_rows(&SequenceNumbers::k_score);
  must(kv_append(
      backend_,
      {.pages = pages_, .batch = batch_, .k = k.data(), .v = v.data(), .k_score = k_score.data()}));
  if (pool_on_enter_) must(compress(backend_, compress_params()));
}

Buffer Rig::key_rows(std::vector<double> SequenceNumbers::*rows) const {
  const std::int64_t width = std::int64_t{case_.heads_kv} * case_.head_dim;
  std::vector<double> packed;
  for (std::size_t s = 0; s < step_.size(); ++s) {
    const std::vector<double>& all = numbers_[s].*rows;
    packed.insert(packed.end(), all.begin() + step_[s].first * width,
                  all.begin() + step_[s].end * width);
  }
  return upload(backend_, packed, backend_.kernels->activation);
}

Buffer Rig::query_rows(Queries which) const {
  std::vector<double> packed;
  for (std::int32_t s = 0; s < case_.sequences(); ++s) {
    for (std::int64_t t = step_[s].first; t < step_[s].end; ++t) {
      append_queries(case_, s, t, which, numbers_type_, packed);
    }
  }
  return upload(backend_, packed, backend_.kernels->activation);
}

std::int32_t Rig::columns() const {
  if (!batch_.any_sparse) return 0;
  return SelectParams{.batch = batch_, .config = case_.config}.columns();
}

ScoreSelectParams Rig::score_select_params(const Buffer& q) const {
  return {.score = {.pages = pages_,
                    .batch = batch_,
                    .config = case_.config,
                    .heads_q = case_.heads_q,
                    .scale = scale_,
                    .q = q.data()},
          .select = {.batch = batch_, .config = case_.config, .heads_kv = case_.heads_kv}};
}

std::vector<std::int32_t> Rig::choose() {
  const Buffer q = query_rows(case_.config.use_nope ? Queries::kScore : Queries::kAttend);
  ScoreSelectParams params = score_select_params(q);
  if (!has_score_select(backend_, params)) return select(score());
  std::vector<std::int32_t> selection(
      static_cast<std::size_t>(case_.heads_kv) * tokens() * columns(), -7);
  const Buffer device_selection = upload(backend_, selection);
  params.select.selection = device_selection.as<std::int32_t>();
  const Buffer workspace = workspace_of(backend_, score_select_workspace_bytes(backend_, params));
  must(score_select(backend_, params, span_of(workspace)));
  must(copy_out(backend_, selection.data(), device_selection.data(),
                selection.size() * sizeof(std::int32_t)));
  return selection;
}

std::vector<double> Rig::score() {
  const std::int64_t count = std::int64_t{case_.heads_kv} * tokens() * blocks();
  const DType dtype = backend_.kernels->accumulate;
  const Buffer q = query_rows(case_.config.use_nope ? Queries::kScore : Queries::kAttend);
  const Buffer scores = poisoned(backend_, count, dtype);
  ScoreParams params = score_select_params(q).score;
  params.scores = scores.data();
  const Buffer workspace = workspace_of(backend_, score_workspace_bytes(backend_, params));
  must(infllm::score(backend_, params, span_of(workspace)));
  return download(backend_, scores, count, dtype);
}

std::vector<std::int32_t> Rig::select(const std::vector<double>& scores) {
  const Buffer device_scores = upload(backend_, scores, backend_.kernels->accumulate);
  SelectParams params{.batch = batch_,
                      .config = case_.config,
                      .heads_kv = case_.heads_kv,
                      .scores = device_scores.data()};
  std::vector<std::int32_t> selection(
      static_cast<std::size_t>(case_.heads_kv) * tokens() * params.columns(), -7);
  const Buffer device_selection = upload(backend_, selection);
  params.selection = device_selection.as<std::int32_t>();
  must(infllm::select(backend_, params));
  must(copy_out(backend_, selection.data(), device_selection.data(),
                selection.size() * sizeof(std::int32_t)));
  return selection;
}

AttendParams Rig::attend_params(Buffer& q, Buffer& o, Buffer& lse) const {
  const std::int64_t width = std::int64_t{case_.heads_q} * case_.head_dim;
  q = query_rows(Queries::kAttend);
  o = poisoned(backend_, tokens() * width, backend_.kernels->activation);
  lse = poisoned(backend_, std::int64_t{case_.heads_q} * tokens(), backend_.kernels->accumulate);
  return {.pages = pages_,
          .batch = batch_,
          .heads_q = case_.heads_q,
          .scale = scale_,
          .q = q.data(),
          .o = o.data(),
          .lse = lse.data()};
}

Attended Rig::attend(const std::vector<std::int32_t>& selection) {
  Buffer q, o, lse, chosen;
  AttendParams params = attend_params(q, o, lse);
  if (!selection.empty()) {
    chosen = upload(backend_, selection);
    params.selection = chosen.as<std::int32_t>();
    params.columns = columns();
  }
  const Buffer workspace = workspace_of(backend_, attend_workspace_bytes(backend_, params));
  must(infllm::attend(backend_, params, span_of(workspace)));
  const std::int64_t rows = std::int64_t{case_.heads_q} * tokens();
  return {download(backend_, o, rows * case_.head_dim, backend_.kernels->activation),
          download(backend_, lse, rows, backend_.kernels->accumulate)};
}

Attended Rig::attention(StepTimes* times) {
  Buffer q, o, lse, q_score;
  const AttendParams attend = attend_params(q, o, lse);
  AttentionParams params{.pages = pages_,
                         .batch = batch_,
                         .config = case_.config,
                         .heads_q = case_.heads_q,
                         .scale = scale_,
                         .q = attend.q,
                         .o = attend.o,
                         .lse = attend.lse,
                         .times = times};
  if (case_.config.use_nope) {
    q_score = query_rows(Queries::kScore);
    params.q_score = q_score.data();
  }
  const Buffer workspace = workspace_of(backend_, attention_workspace_bytes(backend_, params));
  must(infllm::attention(backend_, params, span_of(workspace)));
  const std::int64_t rows = std::int64_t{case_.heads_q} * tokens();
  return {download(backend_, o, rows * case_.head_dim, backend_.kernels->activation),
          download(backend_, lse, rows, backend_.kernels->accumulate)};
}

CachedPlanes Rig::read() {
  std::int64_t keys = 0, fine = 0, coarse = 0;
  for (const std::int32_t length : cached_) {
    keys += length;
    fine += case_.config.fine_windows(length);
    coarse += case_.config.coarse_windows(length);
  }
  const std::int64_t width = std::int64_t{case_.heads_kv} * case_.head_dim;
  const DType dtype = backend_.kernels->activation;
  const Buffer k = poisoned(backend_, keys * width, dtype);
  const Buffer v = poisoned(backend_, keys * width, dtype);
  const Buffer f = poisoned(backend_, fine * width, dtype);
  const Buffer c = poisoned(backend_, coarse * width, dtype);
  must(kv_read(backend_, {.pages = pages_,
                          .batch = batch_,
                          .k = k.data(),
                          .v = v.data(),
                          .fine = f.data(),
                          .coarse = c.data()}));
  return {download(backend_, k, keys * width, dtype), download(backend_, v, keys * width, dtype),
          download(backend_, f, fine * width, dtype), download(backend_, c, coarse * width, dtype)};
}

void Rig::take_pooled(const CachedPlanes& planes) {
  INFLLM_CHECK(backend_.kernels->name == "reference", "only the reference's pages are known here");
  const reference::Pages pages(pages_, batch_);
  const double* fine = planes.fine.data();
  const double* coarse = planes.coarse.data();
  const auto take = [&](const double*& from, double* to) {
    std::copy_n(from, case_.head_dim, to);
    from += case_.head_dim;
  };
  for (std::int32_t s = 0; s < case_.sequences(); ++s) {
    for (std::int64_t j = 0; j < case_.config.fine_windows(cached_[s]); ++j) {
      for (std::int32_t g = 0; g < case_.heads_kv; ++g) take(fine, pages.fine(s, g, j));
    }
    for (std::int64_t m = 0; m < case_.config.coarse_windows(cached_[s]); ++m) {
      for (std::int32_t g = 0; g < case_.heads_kv; ++g) take(coarse, pages.coarse(s, g, m));
    }
  }
}

}  // namespace infllm::testing
