// SPDX-License-Identifier: Apache-2.0
//
// The safetensors format: an 8-byte little-endian header length N, N bytes of JSON, then the data.
//
//   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
//    "__metadata__": {"format": "pt"}}
//
// A file from outside is hostile until proven otherwise. Refused, with a message that names file
// and tensor: a header longer than the file or 100 MB, one that does not begin with '{' or nests
// deeper than 4, more than 200,000 tensors, a name that is empty, longer than 512 bytes or used
// twice, an unknown dtype, a rank above 8, a shape whose size overflows or differs from its span, a
// span outside the data, spans that overlap or leave a hole, data after the last tensor. A tensor
// of size zero has an empty span inside the data. Alignment is not assumed.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/core/tensor.h"

namespace infllm::model {

struct SafetensorsEntry {
  std::string name;
  TensorView view;  // into the bytes that were parsed
};

// Entries sorted by name. `what` begins every message.
Result<std::vector<SafetensorsEntry>> parse_safetensors(std::span<const std::byte> file,
                                                        std::string_view what);

}  // namespace infllm::model
