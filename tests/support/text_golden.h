// SPDX-License-Identifier: Apache-2.0
//
// The half of tools/make_text_golden.py that tests repeat: the same generator, the same strings and
// the same hashes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace infllm::test {

class SplitMix {
 public:
  explicit SplitMix(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();
  std::uint64_t below(std::uint64_t n) { return next() % n; }

 private:
  std::uint64_t state_;
};

std::string from_hex(std::string_view hex);
std::vector<std::string> read_atoms(const std::filesystem::path& path);     // one hex line each
std::vector<std::uint32_t> read_hashes(const std::filesystem::path& path);  // 6 digits each

// Some atoms in a row; every eighth string repeats one of them instead, many times.
std::string string_of(std::uint64_t index, const std::vector<std::string>& atoms);

// FNV-1a, folded to 24 bits; ids as 4 bytes each, little endian.
std::uint32_t hash_bytes(std::string_view bytes);
std::uint32_t hash_ids(std::span<const std::int32_t> ids);

}  // namespace infllm::test
