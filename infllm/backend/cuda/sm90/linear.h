// SPDX-License-Identifier: Apache-2.0
//
// linear and interlude (ops/transformer.h, ops/interlude.h) for one token, the products of a decode
// step: chains of stream.h.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/interlude.h"
#include "infllm/ops/transformer.h"

namespace infllm::cuda::sm90 {

// One token, a weight that streams() takes, and x at a whole 16-byte unit.
bool multiplies(const LinearParams& params);
Status linear(const Backend& backend, const LinearParams& params, std::span<std::byte>);

// One token, four such weights, on a stream of the backend's own.
bool interludes(const Backend& backend, const InterludeParams& params);
Status interlude(const Backend& backend, const InterludeParams& params, std::span<std::byte>);

}  // namespace infllm::cuda::sm90
