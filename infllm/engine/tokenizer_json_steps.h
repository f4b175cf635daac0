// SPDX-License-Identifier: Apache-2.0
//
// The steps of a tokenizer.json around its model. A JSON null is the step that does nothing.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

Status read_json_normalizer(const nlohmann::json& step, NormalizerSpec& spec);
Status read_json_pre_tokenizer(const nlohmann::json& step, PreTokenizerSpec& spec);
Status read_json_decoder(const nlohmann::json& step, DecoderSpec& spec);

// {"content": ..., "special": ..., ...} without its id.
Result<AddedToken> read_added_token(const nlohmann::json& entry, std::string_view where);

// Gives each token its place in the vocabulary; kDataError when another piece has it.
Status add_tokens(const std::vector<AddedToken>& tokens, std::string_view where,
                  TokenizerSpec& spec);

}  // namespace infllm::engine
