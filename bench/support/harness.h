// SPDX-License-Identifier: Apache-2.0
//
// What every benchmark shares: one JSON line a result.
//
//   Timing t = measure({.warmup = 1, .repetitions = 5}, [&] { run(); });
//   Json line = result_line("attend.forward", backend.name);
//   line["shape"] = {{"tokens", 32768}};
//   add_timing(line, t);
//   append_line(path, line);
//
// ms is the median, ms_low and ms_high the quartiles. The fields are described in
// bench/results/README.md.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "bench/support/timing.h"
#include "infllm/core/status.h"
#include "infllm/ops/backend.h"

namespace infllm::bench {

using Json = nlohmann::ordered_json;

// name, backend, device, commit and date. The commit is that of the sources in the current
// directory, with "+" when they differ from it; INFLLM_COMMIT names it for a copy without .git.
Json result_line(std::string_view name, std::string_view backend);
// The same, and of a device its own name and its driver.
Json result_line(std::string_view name, const Backend& backend);
void add_timing(Json& line, const Timing& timing);
// A peer that ran in the same process, and peer_ms / ms.
void add_peer(Json& line, std::string_view peer, const Timing& timing);

// Nothing happens when path is empty.
Status append_line(const std::string& path, const Json& line);

}  // namespace infllm::bench
