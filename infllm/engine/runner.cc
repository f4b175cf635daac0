// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/runner.h"

#include <algorithm>

#include "infllm/ops/kernels.h"
#include "infllm/ops/transformer.h"

namespace infllm::engine {
namespace {

bool has_best(const Backend& backend) { return backend.kernels->top_logits.run != nullptr; }

std::size_t ranking_bytes(const Backend& backend, const model::Model& model, std::int32_t rows) {
  return top_logits_workspace_bytes(backend,
                                    {.rows = rows, .vocabulary = model.config().vocab_size});
}

}  // namespace

std::int64_t Runner::logits_bytes(const model::Model& model, std::int32_t rows) {
  return static_cast<std::int64_t>(model.logits_bytes(rows) +
                                   ranking_bytes(model.backend(), model, rows));
}

Result<Runner> Runner::create(const model::Model& model, const KvPool& pool,
                              const model::StepLimits& limits) {
  const Backend& backend = model.backend();
  Runner runner(model);
  for (std::int32_t i = 0; i < model.config().layers; ++i) runner.layers_.push_back(pool.layer(i));
  runner.workspace_ = INFLLM_TRY(allocate(backend, model.workspace_bytes(limits)));
  runner.logits_ = INFLLM_TRY(allocate(backend, model.logits_bytes(limits.max_logits)));
  if (has_best(backend)) {
    runner.best_ = INFLLM_TRY(
        allocate_visible(backend, static_cast<std::size_t>(limits.max_logits) * sizeof(TopLogits)));
    runner.ranking_ =
        INFLLM_TRY(allocate(backend, ranking_bytes(backend, model, limits.max_logits)));
  }
  runner.host_logits_.resize(static_cast<std::size_t>(model.config().vocab_size));
  return runner;
}

Status Runner::start(const Plan& plan, model::ForwardTimes* times,
                     const model::AttentionObserver* observer) {
  INFLLM_TRY(model_->forward({.batch = plan.batch(),
                              .token_ids = plan.token_ids(),
                              .positions = plan.positions(),
                              .lengths = plan.lengths(),
                              .pages = layers_,
                              .logit_rows = plan.logit_rows(),
                              .num_logits = plan.num_logits(),
                              .logits = logits_.data(),
                              .workspace = {workspace_.data(), workspace_.bytes()},
                              .times = times,
                              .observer = observer}));
  if (best_.data() == nullptr) return {};
  return top_logits(model_->backend(),
                    {.rows = plan.num_logits(),
                     .vocabulary = model_->config().vocab_size,
                     .logits = logits_.data(),
                     .temperatures = plan.temperatures(),
                     .out = best_.as<TopLogits>()},
                    {ranking_.data(), ranking_.bytes()});
}

Status Runner::run(const Plan& plan, model::ForwardTimes* times,
                   const model::AttentionObserver* observer) {
  rows_ = plan.num_logits();
  if (!plan.repeatable() || times != nullptr || observer != nullptr) {
    return start(plan, times, observer);
  }
  Recording& recording = recordings_[{plan.batch().num_sequences, plan.batch().any_sparse}];
  // The first run may still choose algorithms and load code, which cannot be recorded.
  if (!recording.has_run) {
    recording.has_run = true;
    return start(plan, nullptr, nullptr);
  }
  if (recording.graph.handle == nullptr) {
    recording.graph =
        INFLLM_TRY(record(model_->backend(), [&] { return start(plan, nullptr, nullptr); }));
  }
  return replay(model_->backend(), recording.graph);
}

std::int64_t Runner::recorded() const {
  return std::ranges::count_if(
      recordings_, [](const auto& entry) { return entry.second.graph.handle != nullptr; });
}

Result<const TopLogits*> Runner::best(std::int32_t row) {
  INFLLM_CHECK(0 <= row && row < rows_, "a row that the step has not");
  if (best_.data() == nullptr) return static_cast<const TopLogits*>(nullptr);
  INFLLM_TRY(synchronize(model_->backend()));
  return best_.as<const TopLogits>() + row;
}

Result<std::span<const float>> Runner::logits(std::int32_t row) {
  INFLLM_CHECK(0 <= row && row < rows_, "a row that the step has not");
  INFLLM_TRY(read_floats(model_->backend(), logits_.data() + model_->logits_bytes(row),
                         model_->config().vocab_size, host_logits_.data()));
  return std::span<const float>(host_logits_);
}

}  // namespace infllm::engine
