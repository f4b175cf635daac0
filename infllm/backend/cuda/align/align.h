// SPDX-License-Identifier: Apache-2.0
//
// The selection-alignment loss and its gradients on any GPU from Ampere on (align.h of ops says
// what is computed). bf16 or f16, head dimension 64 or 128, groups of up to 128 query heads;
// kUnsupported beyond. Deterministic: no sum depends on the order in which thread blocks run.
// docs/kernels/backward.md states the workspace.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/align.h"

namespace infllm::cuda::align {

Status align(const Backend& backend, const AlignParams& params, std::span<std::byte> workspace);
std::size_t align_bytes(const Backend& backend, const AlignParams& params);

Status align_backward(const Backend& backend, const AlignBackwardParams& params,
                      std::span<std::byte> workspace);
std::size_t align_backward_bytes(const Backend& backend, const AlignBackwardParams& params);

}  // namespace infllm::cuda::align
