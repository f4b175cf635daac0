// SPDX-License-Identifier: Apache-2.0
//
// How a finished answer is told: timing lines for people, one JSON object for scripts.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "infllm/app/session.h"
#include "infllm/engine/engine.h"

namespace infllm::app {

// llama.cpp's lines, then how much attention saw and where it spent its time; on stderr.
void print_timings(const Session& session, const engine::Completion& completion);

nlohmann::json completion_json(const Session& session, const engine::Completion& completion);

// {"compress_ms": .., "score_ms": .., "select_ms": .., "attend_ms": .., "mlp_ms": .., ...}
nlohmann::json times_json(const model::ForwardTimes& times);

// "error: ..." on stderr, and the exit code that goes with it.
int report_failure(const Status& status);

// Writes a text to stdout at once; kIoError when nobody reads it any more, or the disk is full.
Status write_stdout(std::string_view text);

// JSON as text, with invalid UTF-8 (none is expected) replaced rather than thrown about.
std::string dump(const nlohmann::json& json, int indent = -1);

}  // namespace infllm::app
