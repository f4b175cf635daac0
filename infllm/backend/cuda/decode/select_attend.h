// SPDX-License-Identifier: Apache-2.0
//
// score_select and attend (ops/select_attend.h) in one launch, for steps with one token per
// sequence and few enough rows, (sequence, KV head), that a row has at least 16 multiprocessors.
// For 9.0.
//
// Every row has the same number of thread blocks, its parts, all of them resident at once. They
// share out everything that there is to read and tell each other three times what they found
// (exchange.cuh): their share of the soft-max's normaliser, the scores of their blocks, and their
// share of the output.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/select_attend.h"

namespace infllm::cuda::decode {

// Groups of at most 16 heads, heads of 64 or 128, budgets of at most 256 blocks, scores compared as
// bf16.
bool select_attends(const Backend& backend, const SelectAttendParams& params);

Status select_attend(const Backend& backend, const SelectAttendParams& params,
                     std::span<std::byte> workspace);

// Of Device::exchange, which all of them use one after another.
std::size_t exchange_words(int sm_count);

}  // namespace infllm::cuda::decode
