// SPDX-License-Identifier: Apache-2.0
//
// The two passes of Hopper's attend_backward. Each owns what it writes, and takes its own
// workspace.
#pragma once

#include "infllm/backend/cuda/backward/passes.h"

namespace infllm::cuda::sm90 {

using backward::RowStatistics;

// dQ, token-major.
Status query_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace);
std::size_t query_gradient_bytes(const AttendBackwardParams& params);

// dK and dV, block-major.
Status key_gradient(const Backend& backend, const AttendBackwardParams& params,
                    const RowStatistics* stats, std::span<std::byte> workspace);
std::size_t key_gradient_bytes(const Backend& backend, const AttendBackwardParams& params);

}  // namespace infllm::cuda::sm90
