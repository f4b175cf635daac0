// SPDX-License-Identifier: Apache-2.0
//
// Classes of characters, as the programs whose results we reproduce see them.
#pragma once

namespace infllm::engine {

bool is_letter(char32_t code);     // \p{L} in a tokenizer.json pattern
bool is_number(char32_t code);     // \p{N}
bool is_word(char32_t code);       // \w beside an added token with single_word
bool is_printable(char32_t code);  // str.isprintable() of Python, which decides what repr() escapes

// \s of Unicode: the White_Space property.
constexpr bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

// str.isspace() of Python, which strip() and split() go by: four separators more.
constexpr bool is_python_space(char32_t code) {
  return is_space(code) || (code >= 0x1C && code <= 0x1F);
}

}  // namespace infllm::engine
