// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/interlude.h"

#include <cmath>

#include "infllm/ops/check.h"

namespace infllm {
namespace {

Status check_weight(std::string_view name, const LinearWeight* weight, std::int64_t outputs,
                    std::int64_t inputs) {
  INFLLM_TRY(check_pointer("interlude", name, weight));
  if (weight->inputs == inputs && (outputs == 0 || weight->outputs == outputs)) return {};
  return invalid_argument(fmt::format(
      "interlude: {} turns {} numbers into {}, expected {} into {}; o, gate_up, down and next "
      "must fit each other",
      name, weight->inputs, weight->outputs, inputs, outputs == 0 ? weight->outputs : outputs));
}

}  // namespace

bool has_interlude(const Backend& backend, const InterludeParams& params) {
  const Cell<InterludeParams>& cell = backend.kernels->interlude;
  return cell.run != nullptr && (cell.covers == nullptr || cell.covers(backend, params));
}

Status interlude(const Backend& backend, const InterludeParams& params) {
  INFLLM_TRY(check_pointer("interlude", "o", params.o));
  INFLLM_TRY(check_pointer("interlude", "down", params.down));
  const std::int64_t hidden = params.o->outputs;
  const std::int64_t wide = params.down->inputs;
  INFLLM_TRY(check_weight("gate_up", params.gate_up, 2 * wide, hidden));
  INFLLM_TRY(check_weight("down", params.down, hidden, wide));
  if (!(params.epsilon >= 0) || !std::isfinite(params.residual_scale + params.next_scale)) {
    return invalid_argument(fmt::format(
        "interlude: epsilon = {}, scales {} and {}; expected finite numbers, epsilon not negative",
        params.epsilon, params.residual_scale, params.next_scale));
  }
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("interlude", "mlp_norm", params.mlp_norm));
  INFLLM_TRY(check_pointer("interlude", "attended", params.attended));
  INFLLM_TRY(check_pointer("interlude", "hidden", params.hidden));
  INFLLM_TRY(check_pointer("interlude", "gated", params.gated));
  if (params.next != nullptr) {
    INFLLM_TRY(check_weight("next", params.next, 0, hidden));
    INFLLM_TRY(check_pointer("interlude", "next_norm", params.next_norm));
    INFLLM_TRY(check_pointer("interlude", "y", params.y));
  }
  return run_cell("interlude", backend, backend.kernels->interlude, params, {});
}

}  // namespace infllm
