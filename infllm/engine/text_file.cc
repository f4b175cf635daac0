// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/text_file.h"

#include <fmt/format.h>

#include <fstream>
#include <system_error>

namespace infllm::engine {

Result<std::string> read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    return not_found(fmt::format("{}: no such file", path.string()));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) return io_error(fmt::format("{}: cannot be opened for reading", path.string()));
  // Read rather than ask for the size: a file may grow between the two.
  std::string text;
  char block[1 << 16];
  while (in.read(block, sizeof block) || in.gcount() > 0) {
    text.append(block, static_cast<std::size_t>(in.gcount()));
    if (text.size() > max_bytes) {
      return data_error(
          fmt::format("{}: larger than the limit of {} bytes", path.string(), max_bytes));
    }
  }
  if (in.bad()) return io_error(fmt::format("{}: read error", path.string()));
  return text;
}

}  // namespace infllm::engine
