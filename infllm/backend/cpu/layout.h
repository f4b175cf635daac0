// SPDX-License-Identifier: Apache-2.0
//
// Which caches the cpu columns can hold, and how large their pages are (page.h says how they look).
#pragma once

#include "infllm/ops/kv_cache.h"

namespace infllm::cpu {

// Pages of 64 tokens, bf16 or f32, head dimensions 16, 32, ... 256.
Status check_layout(const KvLayout& layout);
std::int64_t page_bytes(const KvLayout& layout);

}  // namespace infllm::cpu
