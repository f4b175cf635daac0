// SPDX-License-Identifier: Apache-2.0
//
// attend (ops/attend.h) for batches with one token per sequence, over selected or over all blocks.
// The heads of a group are the 16 rows of the matrix instruction, so a block is read once for all
// of them (groups of more than 16 heads read it once for every 16). The blocks of a row, a
// (sequence, KV head), are shared out among several thread blocks.
//
// On 9.0 these form clusters that merge their results through each other's shared memory. Results
// of several clusters, and of all blocks on other devices, are merged by a second launch.
//
// With params.follows_select the forced blocks, a third of all with the released numbers, are
// attended to while score_select still runs.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"

namespace infllm::cuda::decode {

// One token per sequence, heads of 64 or 128; any group.
bool attends(const Backend& backend, const AttendParams& params);

std::size_t attend_bytes(const Backend& backend, const AttendParams& params);

// For every device from 8.0 on.
Status attend_in_splits(const Backend& backend, const AttendParams& params,
                        std::span<std::byte> workspace);
// For 9.0.
Status attend_in_clusters(const Backend& backend, const AttendParams& params,
                          std::span<std::byte> workspace);

}  // namespace infllm::cuda::decode
