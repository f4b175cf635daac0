// SPDX-License-Identifier: Apache-2.0
//
// What the machine can do, measured in the same run as the kernel that is compared with it.
#pragma once

#include "infllm/ops/backend.h"

namespace infllm::bench {

// Multiply-adds (two operations each) per second over all threads of the pool, from registers.
double peak_f32_flops(ThreadPool& pool);  // fused float multiply-add, widest registers
double peak_bf16_flops(
    ThreadPool& pool);  // bf16 pair dot product; the float rate where there is none

// Bytes per second of a sum over memory that no cache holds, allocated as the backend allocates.
double read_bandwidth(const Backend& backend);

}  // namespace infllm::bench
