// SPDX-License-Identifier: Apache-2.0
//
// Where the golden files and the checkpoint of the tests lie: the environment's INFLLM_SOURCE_DIR,
// or else the checkout that the tests were built in. tools/gpu_test.sh sets it, so that a built
// folder can be carried to another machine.
#pragma once

#include <cstdlib>
#include <filesystem>

namespace infllm::testing {

inline std::filesystem::path source_folder() {
  const char* folder = std::getenv("INFLLM_SOURCE_DIR");
  return folder != nullptr && *folder != '\0' ? folder : INFLLM_SOURCE_DIR;
}

}  // namespace infllm::testing
