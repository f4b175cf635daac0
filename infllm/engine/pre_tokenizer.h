// SPDX-License-Identifier: Apache-2.0
//
// The second step of a tokenizer: cuts normalized text into the words that BPE never merges across.
//
// The split patterns of the GPT-2, Llama 3 and Qwen 2 families are written out by hand, as one left
// to right scan with the alternatives of the pattern in their order; there is no regular expression
// engine, so no input makes it slow.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

// The pattern whose text a tokenizer.json gives, or kNone when it is not one we know.
SplitPattern known_split_pattern(std::string_view regex);

// The words of `segment`, valid UTF-8. `at_start`: it begins where the text begins.
std::vector<std::string> pre_tokenize(const PreTokenizerSpec& spec, std::string_view segment,
                                      bool at_start);

// ByteLevel's alphabet: byte -> its printable character, and back (-1 for any other character).
char32_t byte_level_character(unsigned char byte);
int byte_level_byte(char32_t character);

}  // namespace infllm::engine
