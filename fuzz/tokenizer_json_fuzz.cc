// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as tokenizer.json: refused with a message, or a tokenizer that works.
#include <cstdint>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infllm;
  using namespace infllm::engine;
  if (size > 64 * 1024) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  Result<TokenizerSpec> spec = read_tokenizer_json(bytes);
  if (!spec.ok()) return 0;
  Result<Tokenizer> tokenizer = Tokenizer::create(std::move(*spec));
  if (!tokenizer.ok()) return 0;
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
  return 0;
}
