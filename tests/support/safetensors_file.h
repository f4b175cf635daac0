// SPDX-License-Identifier: Apache-2.0
//
// safetensors files for tests: well formed from a list of tensors, or from any header text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace infllm::testing {

// The format's bytes around a header and `data` that need not fit it.
std::string safetensors_bytes(std::string_view header, std::string_view data);

struct FileTensor {
  std::string dtype = "F32";
  std::vector<std::int64_t> shape;
  std::string data;  // empty: zeros
};
std::string safetensors_bytes(const std::map<std::string, FileTensor>& tensors);

void write_file(const std::filesystem::path& path, std::string_view bytes);

// A fresh folder that is removed at the end of the scope.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace infllm::testing
