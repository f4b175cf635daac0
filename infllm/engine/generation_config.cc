// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/generation_config.h"

#include <fmt/format.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "infllm/core/json.h"
#include "infllm/engine/text_file.h"

namespace infllm::engine {
namespace {

constexpr char kFile[] = "generation_config.json";
constexpr std::size_t kMaxFileBytes = std::size_t{1} << 20;

// A number that the file may leave out or set to null.
template <typename T>
Status read_number(const nlohmann::json& config, const char* name, T& value) {
  const auto field = config.find(name);
  if (field == config.end() || field->is_null()) return {};
  if (!field->is_number()) {
    return data_error(fmt::format("{}: {} is no number", kFile, name));
  }
  const auto number = field->get<double>();
  if (!(number >= static_cast<double>(std::numeric_limits<T>::lowest()) &&
        number <= static_cast<double>(std::numeric_limits<T>::max()))) {
    return data_error(fmt::format("{}: {} = {} is out of range", kFile, name, number));
  }
  value = static_cast<T>(number);
  return {};
}

}  // namespace

Result<GenerationConfig> parse_generation_config(std::string_view json) {
  const nlohmann::json config =
      INFLLM_TRY(parse_json(json, {.what = kFile, .max_bytes = kMaxFileBytes}));
  if (!config.is_object()) return data_error(fmt::format("{}: expected an object", kFile));
  GenerationConfig result;
  std::int32_t max_new_tokens = 0;
  INFLLM_TRY(read_number(config, "max_new_tokens", max_new_tokens));
  if (max_new_tokens > 0) result.max_new_tokens = max_new_tokens;
  SamplingParams& sampling = result.sampling;
  INFLLM_TRY(read_number(config, "repetition_penalty", sampling.repetition_penalty));
  const auto do_sample = config.find("do_sample");
  if (do_sample != config.end() && do_sample->is_boolean() && do_sample->get<bool>()) {
    sampling.temperature = 1;
    INFLLM_TRY(read_number(config, "temperature", sampling.temperature));
    INFLLM_TRY(read_number(config, "top_k", sampling.top_k));
    INFLLM_TRY(read_number(config, "top_p", sampling.top_p));
    INFLLM_TRY(read_number(config, "min_p", sampling.min_p));
  }
  const Status status = check(sampling);
  if (!status.ok()) return data_error(fmt::format("{}: {}", kFile, status.message()));
  return result;
}

Result<GenerationConfig> read_generation_config(const std::filesystem::path& folder) {
  std::error_code error;
  if (!std::filesystem::exists(folder / kFile, error)) return GenerationConfig();
  return parse_generation_config(INFLLM_TRY(read_text_file(folder / kFile, kMaxFileBytes)));
}

}  // namespace infllm::engine
