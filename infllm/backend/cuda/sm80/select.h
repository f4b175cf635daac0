// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of each row of scores, on any GPU from Ampere on (select.h of ops says which).
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/select.h"

namespace infllm::cuda::sm80 {

// Sequences of up to 32,768 blocks (two million tokens); kUnsupported beyond.
Status select(const Backend& backend, const SelectParams& params, std::span<std::byte> workspace);

}  // namespace infllm::cuda::sm80
