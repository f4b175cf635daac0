// SPDX-License-Identifier: Apache-2.0
//
// Runs planned steps: the model's forward pass, then the best logits of its rows where the backend
// has that step. It owns the memory that a step works in.
//
//   Runner runner = INFLLM_TRY(Runner::create(model, pool, limits));
//   INFLLM_TRY(plan.build(work, rule, pool));
//   INFLLM_TRY(runner.run(plan));                           // a device returns before it is done
//   const TopLogits* best = INFLLM_TRY(runner.best(0));     // waits; null: read the row
//   std::span<const float> row = INFLLM_TRY(runner.logits(0));
//
// A repeatable step (see Plan) runs as it is the first time, is recorded the second time and
// replayed from then on: one call for hundreds of launches. Both give the same numbers.
#pragma once

#include <map>
#include <span>
#include <vector>

#include "infllm/engine/kv_pool.h"
#include "infllm/engine/plan.h"
#include "infllm/model/model.h"
#include "infllm/ops/sampling.h"

namespace infllm::engine {

class Runner {
 public:
  // Keeps a reference to the model. The pool's memory must outlive the runner.
  static Result<Runner> create(const model::Model& model, const KvPool& pool,
                               const model::StepLimits& limits);
  // What create() would allocate of the backend's memory beside the workspace.
  static std::int64_t logits_bytes(const model::Model& model, std::int32_t rows);

  // With `times`, part by part and waiting for each. A recorded step has no parts, so asking for
  // times, or for an observer of each layer, runs it unrecorded.
  Status run(const Plan& plan, model::ForwardTimes* times = nullptr,
             const model::AttentionObserver* observer = nullptr);

  // Of row `row` of the last step's logits. Valid until the next run(), logits also only until the
  // next call.
  Result<const TopLogits*> best(std::int32_t row);
  Result<std::span<const float>> logits(std::int32_t row);

  std::int64_t recorded() const;  // steps that are replayed from now on

 private:
  // What is known of repeatable steps with one number of sequences and one kind of attention.
  struct Recording {
    bool has_run = false;
    Graph graph;
  };

  explicit Runner(const model::Model& model) : model_(&model) {}
  Status start(const Plan& plan, model::ForwardTimes* times,
               const model::AttentionObserver* observer);

  const model::Model* model_;
  std::vector<KvPages> layers_;
  Buffer workspace_, logits_, ranking_;
  Buffer best_;  // [R] visible; empty: the backend has no such step
  std::map<std::pair<std::int32_t, bool>, Recording> recordings_;
  std::int32_t rows_ = 0;           // of the last step
  std::vector<float> host_logits_;  // [V]
};

}  // namespace infllm::engine
