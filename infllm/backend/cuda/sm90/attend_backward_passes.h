// SPDX-License-Identifier: Apache-2.0
//
// The passes of Hopper's attend_backward: two for sparse batches, each of which owns what it
// writes, or one for dense ones. Each takes its own workspace.
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
std::size_t key_gradient_bytes(const AttendBackwardParams& params);

// All three, of a batch without sparse sequences. It does not suit one long sequence among many
// short ones: the host knows the longest alone, and most thread blocks would find nothing to do.
bool suits_dense_gradient(const AttendParams& forward);
Status dense_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace);
std::size_t dense_gradient_bytes(const AttendBackwardParams& params);

}  // namespace infllm::cuda::sm90
