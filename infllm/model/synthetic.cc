// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "infllm/model/weight_source.h"

namespace infllm::model {
namespace {

constexpr std::uint64_t kNoiseSize = std::uint64_t{1} << 18;  // stays in a core's cache
constexpr double kTableDeviation = 0.1;                       // of embeddings and head

// splitmix64: turns consecutive numbers into independent looking ones.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// FNV-1a, the same on every machine.
std::uint64_t hash(const std::string& text) {
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

// The sum of the four 16-bit parts of a random word, with mean 0 and variance 1: close to a normal
// distribution, without tails.
float noise(std::uint64_t seed) {
  const std::uint64_t word = mix(seed);
  double sum = 0;
  for (int part = 0; part < 4; ++part) {
    sum += static_cast<double>((word >> (16 * part)) & 0xffffu) / 65535.0 - 0.5;
  }
  return static_cast<float>(sum * std::sqrt(3.0));  // each part has variance 1 / 12
}

class Synthetic : public WeightSource {
 public:
  explicit Synthetic(std::uint64_t seed) : seed_(seed) {}

  Result<DType> check(const std::string&, std::span<const std::int64_t>) const override {
    return DType::kBF16;
  }

  Result<WeightTensor> tensor(const std::string& name,
                              std::span<const std::int64_t> shape) const override {
    WeightTensor out;
    out.view.dtype = DType::kBF16;
    for (const std::int64_t size : shape) {
      out.view.shape[static_cast<std::size_t>(out.view.rank++)] = size;
    }
    // Left uninitialised: an embedding table has 600 MB, every byte of which is written below.
    const auto storage =
        std::make_shared_for_overwrite<std::byte[]>(static_cast<std::size_t>(out.view.bytes()));
    auto* values = reinterpret_cast<BF16*>(storage.get());
    out.view.data = values;
    out.owner = storage;
    if (shape.size() == 1) {
      std::fill_n(values, shape[0], BF16(1.0f));
    } else {
      fill_matrix(name, shape[0], shape[1], values);
    }
    return out;
  }

  std::vector<std::string> names() const override { return {}; }
  std::string description() const override { return "generated weights"; }

 private:
  void fill_matrix(const std::string& name, std::int64_t rows, std::int64_t columns,
                   BF16* out) const {
    const bool is_table =
        name.find("embed_tokens") != std::string::npos || name.find("lm_head") != std::string::npos;
    const auto deviation = static_cast<float>(
        is_table ? kTableDeviation : 1 / std::sqrt(static_cast<double>(columns)));
    std::vector<BF16> window(kNoiseSize + static_cast<std::uint64_t>(columns));
    for (std::uint64_t i = 0; i < window.size(); ++i) {
      window[i] = BF16(deviation * noise(seed_ + i % kNoiseSize));
    }
    const std::uint64_t tensor_seed = seed_ ^ hash(name);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint64_t offset = mix(tensor_seed + static_cast<std::uint64_t>(row)) % kNoiseSize;
      std::memcpy(out + row * columns, window.data() + offset,
                  static_cast<std::size_t>(columns) * sizeof(BF16));
    }
  }

  std::uint64_t seed_;
};

}  // namespace

std::unique_ptr<WeightSource> synthetic_weights(std::uint64_t seed) {
  return std::make_unique<Synthetic>(seed);
}

}  // namespace infllm::model
