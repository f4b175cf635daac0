// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/linear.h"

#include <array>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm90/stream.h"
#include "infllm/ops/kernels.h"

namespace infllm::cuda::sm90 {

bool multiplies(const LinearParams& p) { return p.tokens == 1 && streams(*p.weight); }

Status linear(const Backend& backend, const LinearParams& p, std::span<std::byte>) {
  const StreamProduct product{
      .weight = p.weight, .x = p.x, .y = p.y, .alpha = p.alpha, .beta = p.accumulate ? 1.0f : 0.0f};
  return stream(device_of(backend), backend.kernels->activation, {&product, 1}, 0);
}

bool interludes(const Backend& backend, const InterludeParams& p) {
  return p.tokens == 1 && device_of(backend).arrivals != nullptr && streams(*p.o) &&
         streams(*p.gate_up) && streams(*p.down) && (p.next == nullptr || streams(*p.next));
}

Status interlude(const Backend& backend, const InterludeParams& p, std::span<std::byte>) {
  const std::array<StreamProduct, kMostStreamed> products = {
      {{.weight = p.o, .x = p.attended, .y = p.hidden, .alpha = p.residual_scale, .beta = 1},
       {.weight = p.gate_up, .x = p.hidden, .norm_weight = p.mlp_norm, .y = p.gated, .gated = true},
       {.weight = p.down, .x = p.gated, .y = p.hidden, .alpha = p.residual_scale, .beta = 1},
       {.weight = p.next,
        .x = p.hidden,
        .norm_weight = p.next_norm,
        .y = p.y,
        .alpha = p.next_scale}}};
  const std::span<const StreamProduct> chain(products);
  return stream(device_of(backend), backend.kernels->activation,
                p.next == nullptr ? chain.first(kMostStreamed - 1) : chain, p.epsilon);
}

}  // namespace infllm::cuda::sm90
