// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "infllm/app/options.h"
#include "infllm/app/session.h"

namespace infllm::app {

// A request without its prompt: generation_config.json's sampling, overridden by the flags, the
// stop strings and tokens, and Ctrl-C.
Result<engine::Request> base_request(const Session& session, const Options& options);

}  // namespace infllm::app
