// SPDX-License-Identifier: Apache-2.0
//
// score_select and attend (ops/select_attend.h) in one launch, for steps with one token per
// sequence and up to one row, (sequence, KV head), for each multiprocessor. For 9.0.
//
// Every row has the same number of thread blocks, its parts. Their warps ask for what comes next
// while parts tell each other what they found (exchange.cuh) and choose blocks, so that the memory
// has something to do all the time.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/select_attend.h"

namespace infllm::cuda::decode {

// Groups of at most 16 heads, heads of 64 or 128, budgets of at most 256 blocks, scores compared as
// bf16, and contexts whose keys find room beside the rings: 512K tokens.
bool streams_rows(const Backend& backend, const SelectAttendParams& params);

Status stream_rows(const Backend& backend, const SelectAttendParams& params,
                   std::span<std::byte> workspace);

}  // namespace infllm::cuda::decode
