// SPDX-License-Identifier: Apache-2.0
//
// Takes the place of the whole folder in a build without CUDA.
#include <fmt/format.h>

#include "infllm/backend/cuda/open.h"

namespace infllm::cuda {

std::vector<std::string> available() { return {}; }

Result<Backend> open(std::string_view name) {
  return unsupported(
      fmt::format("no device \"{}\": this build has no CUDA column; build with "
                  "-DINFLLM_CUDA=ON and the CUDA toolkit, or `make cuda`",
                  name));
}

Backend on_stream(const Backend& backend, void*) { return backend; }

KeepCurrentDevice::KeepCurrentDevice() : ordinal_(-1) {}
KeepCurrentDevice::~KeepCurrentDevice() = default;

}  // namespace infllm::cuda
