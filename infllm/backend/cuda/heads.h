// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/ops/kv_cache.h"

namespace infllm::cuda {

// layout.cc: OK for a layout that check_layout (rows.h) lets through, if at most so many query
// heads share a KV head; otherwise kUnsupported, "score: 40 query heads share a KV head, but ...".
Status check_heads(std::string_view step, const KvLayout& layout, std::int32_t heads_q,
                   std::int32_t most);

}  // namespace infllm::cuda
