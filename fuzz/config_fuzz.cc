// SPDX-License-Identifier: Apache-2.0
//
// Any text as config.json and as a shard index: refused with a message, or every number that we
// derive from it is one that the rest of the program can work with.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "infllm/model/checkpoint.h"
#include "infllm/model/config.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void use(const infllm::model::ModelConfig& config) {
  require(config.heads == config.group() * config.kv_heads);
  require(config.parameters() > 0);
  require(std::isfinite(config.residual_scale()) && std::isfinite(config.logit_scale()));
  require(infllm::check(config.kv_layout(infllm::DType::kBF16)).ok());
  for (const std::int32_t token : config.eos_tokens)
    require(token >= 0 && token < config.vocab_size);

  const infllm::model::Rope rope(config.rope, config.head_dim, config.max_positions);
  std::vector<float> cos(static_cast<std::size_t>(config.head_dim / 2));
  std::vector<float> sin(cos.size());
  rope.row(config.max_positions - 1, config.max_positions, cos.data(), sin.data());
  for (const float value : cos) require(std::isfinite(value));
  for (const float value : sin) require(std::isfinite(value));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = infllm::model::parse_config(text);
  if (config.ok()) {
    use(*config);
  } else {
    require(!config.status().message().empty());
  }
  const auto index = infllm::model::parse_shard_index(text, "fuzz");
  if (!index.ok()) return 0;
  for (const auto& [tensor, shard] : *index) {
    require(shard.find('/') == std::string::npos && shard.ends_with(".safetensors"));
  }
  return 0;
}
