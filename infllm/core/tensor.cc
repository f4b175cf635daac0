// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace infllm {

std::string shape_string(const TensorView& tensor) {
  return fmt::format("[{}]",
                     fmt::join(tensor.shape.begin(), tensor.shape.begin() + tensor.rank, ", "));
}

}  // namespace infllm
