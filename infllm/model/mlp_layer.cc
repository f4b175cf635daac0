// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/layer.h"

namespace infllm::model {

Status mlp_layer(const Step& step, const LayerWeights& weights) {
  const ModelConfig& c = step.config;
  const Backend& backend = step.backend;
  const std::int64_t tokens = step.batch.num_tokens;

  const LinearParams together{.weight = &weights.gate_up,
                              .tokens = tokens,
                              .x = step.at(step.plan.hidden),
                              .y = step.at(step.plan.gated),
                              .norm = weights.mlp_norm.data(),
                              .epsilon = c.rms_norm_eps,
                              .gated = true};
  if (linear_fuses(backend, together)) {
    INFLLM_TRY(
        timed(step, &ForwardTimes::mlp, [&] { return linear(backend, together, step.workspace); }));
  } else {
    INFLLM_TRY(normed_linear(step, weights.mlp_norm,
                             {.weight = &weights.gate_up,
                              .tokens = tokens,
                              .x = step.at(step.plan.hidden),
                              .y = step.at(step.plan.gate_up)},
                             step.at(step.plan.normed), &ForwardTimes::mlp));
    INFLLM_TRY(timed(step, &ForwardTimes::mlp, [&] {
      return swiglu(backend, {.tokens = tokens,
                              .width = c.intermediate_size,
                              .x = step.at(step.plan.gate_up),
                              .y = step.at(step.plan.gated)});
    }));
  }
  return timed(step, &ForwardTimes::mlp, [&] {
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
