// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as a tokenizer's file: refused with a message, or a tokenizer that works.
#pragma once

#include <cstdint>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {

inline void read_and_use(Result<TokenizerSpec> (*reader)(std::string_view),
                         const std::uint8_t* data, std::size_t size) {
  if (size > 64 * 1024) return;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  Result<TokenizerSpec> spec = reader(bytes);
  if (!spec.ok()) return;
  Result<Tokenizer> tokenizer = Tokenizer::create(std::move(*spec));
  if (!tokenizer.ok()) return;
  for (const bool special : {false, true}) {
    // Parts of the file itself are the likeliest text to hit its pieces.
    for (const auto& text :
         {bytes.substr(0, 512), std::string_view(" The  needle \xE2\x96\x81\xFF<s>")}) {
      const auto ids = tokenizer->encode(text, {.parse_special = special});
      for (const std::int32_t id : ids) {
        INFLLM_CHECK(id >= 0 && id < tokenizer->vocab_size(), "an id out of range");
      }
      INFLLM_CHECK(utf8_valid(tokenizer->decode(ids)), "decoded text is no UTF-8");
    }
  }
}

}  // namespace infllm::engine
