// SPDX-License-Identifier: Apache-2.0
//
// The filters that work on sequences; apply_filter() of jinja_call.h falls through to them.
#pragma once

#include "infllm/core/status.h"
#include "infllm/engine/jinja_call.h"

namespace infllm::engine::jinja {

Result<Value> apply_sequence_filter(const Call& call);

}  // namespace infllm::engine::jinja
