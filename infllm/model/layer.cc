// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/layer.h"

namespace infllm::model {

Status normed_linear(const Step& step, const Buffer& norm, LinearParams params, void* normed,
                     double ForwardTimes::*part) {
  LinearParams together = params;
  together.norm = norm.data();
  together.epsilon = step.config.rms_norm_eps;
  if (linear_fuses(step.backend, together)) {
    return timed(step, part, [&] { return linear(step.backend, together, step.workspace); });
  }
  INFLLM_TRY(timed(step, &ForwardTimes::norm, [&] {
    return rms_norm(step.backend, {.tokens = params.tokens,
                                   .width = step.config.hidden_size,
                                   .x = params.x,
                                   .weight = norm.data(),
                                   .epsilon = step.config.rms_norm_eps,
                                   .y = normed});
  }));
  params.x = normed;
  return timed(step, part, [&] { return linear(step.backend, params, step.workspace); });
}

}  // namespace infllm::model
