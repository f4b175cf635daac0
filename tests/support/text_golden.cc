// SPDX-License-Identifier: Apache-2.0
#include "tests/support/text_golden.h"

#include <fstream>

namespace infllm::test {

std::uint64_t SplitMix::next() {
  state_ += 0x9E3779B97F4A7C15ull;
  std::uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

std::string from_hex(std::string_view hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16));
  }
  return bytes;
}

std::vector<std::string> read_atoms(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::vector<std::string> atoms;
  for (std::string line; std::getline(in, line);) atoms.push_back(from_hex(line));
  return atoms;
}

std::vector<std::uint32_t> read_hashes(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::vector<std::uint32_t> hashes;
  for (std::string row; in >> row;) {
    for (std::size_t i = 0; i + 6 <= row.size(); i += 6) {
      hashes.push_back(static_cast<std::uint32_t>(std::stoul(row.substr(i, 6), nullptr, 16)));
    }
  }
  return hashes;
}

std::string string_of(std::uint64_t index, const std::vector<std::string>& atoms) {
  SplitMix random(index);
  std::string text;
  if (index % 8 == 7) {
    const std::string& atom = atoms[random.below(atoms.size())];
    for (std::uint64_t n = 1 + random.below(64); n > 0; --n) text += atom;
    return text;
  }
  for (std::uint64_t n = random.below(24); n > 0; --n) text += atoms[random.below(atoms.size())];
  return text;
}

std::uint32_t hash_bytes(std::string_view bytes) {
  std::uint64_t h = 0xCBF29CE484222325ull;
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return static_cast<std::uint32_t>((h ^ (h >> 24) ^ (h >> 48)) & 0xFFFFFF);
}

std::uint32_t hash_ids(std::span<const std::int32_t> ids) {
  std::string bytes;
  for (const std::int32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(id >> shift);
  }
  return hash_bytes(bytes);
}

}  // namespace infllm::test
