// SPDX-License-Identifier: Apache-2.0
//
// How a checkpoint wants its answers drawn: generation_config.json. (Its end-of-sequence tokens are
// read with the tokenizer.)
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/sampler.h"

namespace infllm::engine {

struct GenerationConfig {
  SamplingParams sampling{.temperature = 0};   // without do_sample: greedy
  std::optional<std::int32_t> max_new_tokens;  // of an answer
};

// Of a checkpoint folder; the defaults above when the file is missing. kDataError names the field
// that is out of range.
Result<GenerationConfig> read_generation_config(const std::filesystem::path& folder);
Result<GenerationConfig> parse_generation_config(std::string_view json);

}  // namespace infllm::engine
