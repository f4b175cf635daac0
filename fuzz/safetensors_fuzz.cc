// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as a safetensors file: refused with a message, or every tensor lies in the file.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "infllm/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  const auto entries = infllm::model::parse_safetensors(file, "fuzz");
  if (!entries.ok()) {
    if (entries.status().message().empty()) std::abort();
    return 0;
  }
  std::uint64_t covered = 0;
  unsigned sum = 0;
  for (const auto& entry : *entries) {
    const auto bytes = static_cast<std::size_t>(entry.view.bytes());
    const auto* first = static_cast<const std::byte*>(entry.view.data);
    for (std::size_t i = 0; i < bytes; ++i) sum += std::to_integer<unsigned>(first[i]);
    covered += bytes;
  }
  // Tensors neither overlap nor leave a hole, so together they are shorter than the file.
  if (covered > size || sum == ~0u) std::abort();
  return 0;
}
