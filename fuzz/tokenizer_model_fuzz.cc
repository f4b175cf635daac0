// SPDX-License-Identifier: Apache-2.0
//
// tokenizer.model.
#include "fuzz/tokenizer_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  infllm::engine::read_and_use(infllm::engine::read_tokenizer_model, data, size);
  return 0;
}
