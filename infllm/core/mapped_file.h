// SPDX-License-Identifier: Apache-2.0
//
// A whole file as read-only memory. Pages are read when they are touched, so opening a 16 GB
// checkpoint is immediate, and untouched tensors cost nothing.
//
//   MappedFile file = INFLLM_TRY(MappedFile::open(folder / "model.safetensors"));
//   std::string_view text = file.text();
//
// The mapping lives as long as the last copy of the object. A file that another process truncates
// while it is mapped raises SIGBUS on access: replace checkpoints by renaming, not by rewriting.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>

#include "infllm/core/status.h"

namespace infllm {

class MappedFile {
 public:
  MappedFile() = default;

  // kNotFound when there is no such file, kIoError when it is not a regular file or the system
  // refuses. Messages begin with the path. An empty file maps to no bytes.
  static Result<MappedFile> open(const std::filesystem::path& path);

  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_.get()), size_}; }
  std::size_t size() const { return size_; }

  // Keeps the mapping alive for whoever holds a view into it.
  std::shared_ptr<const std::byte> owner() const { return data_; }

 private:
  std::shared_ptr<const std::byte> data_;
  std::size_t size_ = 0;
};

}  // namespace infllm
