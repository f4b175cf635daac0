// SPDX-License-Identifier: Apache-2.0
//
// A whole small file as a string, with a limit on its size.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

#include "infllm/core/status.h"

namespace infllm::engine {

// kNotFound when there is no such regular file, kDataError when it is larger than `max_bytes`,
// kIoError when reading fails. Messages begin with the path.
Result<std::string> read_text_file(const std::filesystem::path& path, std::size_t max_bytes);

}  // namespace infllm::engine
