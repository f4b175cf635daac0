// SPDX-License-Identifier: Apache-2.0
#include "tests/support/safetensors_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>

namespace infllm::testing {

std::string safetensors_bytes(std::string_view header, std::string_view data) {
  std::string file;
  for (int i = 0; i < 8; ++i) {
    file.push_back(static_cast<char>((std::uint64_t{header.size()} >> (8 * i)) & 0xff));
  }
  return file.append(header).append(data);
}

std::string safetensors_bytes(const std::map<std::string, FileTensor>& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    static const std::map<std::string, std::size_t> kSizes = {{"F64", 8}, {"F32", 4},  {"I32", 4},
                                                              {"F16", 2}, {"BF16", 2}, {"U8", 1}};
    std::size_t bytes = kSizes.at(tensor.dtype);
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::size_t>(size);
    std::string values = tensor.data;
    values.resize(bytes, '\0');
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + bytes}}};
    data += values;
  }
  return safetensors_bytes(header.dump(), data);
}

void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

TemporaryFolder::TemporaryFolder() {
  std::string name = ::testing::TempDir() + "infllm_XXXXXX";
  if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "no folder " << name;
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace infllm::testing
