// SPDX-License-Identifier: Apache-2.0
//
// The functions that templates find without being given them: range, dict, namespace,
// raise_exception, and strftime_now where the caller says what time it is.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/jinja_call.h"

namespace infllm::engine::jinja {

bool is_function(std::string_view name, bool has_time);
Result<Value> call_function(const Call& call, std::optional<std::int64_t> now);

}  // namespace infllm::engine::jinja
