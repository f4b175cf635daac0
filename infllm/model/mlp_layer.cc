// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/layer.h"

namespace infllm::model {

Status mlp_layer(const Step& step, const LayerWeights& weights) {
  const ModelConfig& c = step.config;
  const Backend& backend = step.backend;
  const std::int64_t tokens = step.batch.num_tokens;

  INFLLM_TRY(normed_linear(step, weights.mlp_norm,
                           {.weight = &weights.gate_up,
                            .tokens = tokens,
                            .x = step.at(step.plan.hidden),
                            .y = step.at(step.plan.gate_up)},
                           step.at(step.plan.normed), &ForwardTimes::mlp));
  return timed(step, &ForwardTimes::mlp, [&]() -> Status {
    INFLLM_TRY(swiglu(backend, {.tokens = tokens,
                                .width = c.intermediate_size,
                                .x = step.at(step.plan.gate_up),
                                .y = step.at(step.plan.gated)}));
    return linear(backend,
                  {.weight = &weights.down,
                   .tokens = tokens,
                   .x = step.at(step.plan.gated),
                   .y = step.at(step.plan.hidden),
                   .alpha = c.residual_scale(),
                   .accumulate = true},
                  step.workspace);
  });
}

}  // namespace infllm::model
