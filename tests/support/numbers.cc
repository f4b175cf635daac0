// SPDX-License-Identifier: Apache-2.0
#include "tests/support/numbers.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numbers>

#include "infllm/backend/reference/rounding.h"
#include "infllm/core/tensor.h"
#include "tests/support/must.h"

namespace infllm::testing {

using reference::round_to;

std::uint64_t Random::next() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Random::normal() {
  // The sum of four uniform values, of 16 bits each, has variance 1/3.
  const std::uint64_t bits = next();
  double sum = 0;
  for (int shift = 0; shift < 64; shift += 16) {
    sum += static_cast<double>((bits >> shift) & 0xffffu) + 0.5;
  }
  return (sum * 0x1p-16 - 2) * std::numbers::sqrt3;
}

std::int64_t Random::below(std::int64_t limit) {
  return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(limit));
}

std::vector<double> Random::normals(std::int64_t count, DType dtype, double scale) {
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) value = round_to(dtype, scale * normal());
  return values;
}

std::vector<SequenceNumbers> numbers_of(const Case& c, DType activation) {
  constexpr std::int32_t kThemeTokens = 64;
  std::vector<SequenceNumbers> all;
  Random random(c.seed);
  for (std::int32_t s = 0; s < c.sequences(); ++s) {
    const std::int64_t length = c.length(s);
    const std::int64_t key_width = std::int64_t{c.heads_kv} * c.head_dim;
    // Keys of a block share a direction, as text does; a quarter of it is enough to tell them
    // apart.
    const auto keys = [&] {
      std::vector<double> k;
      std::vector<double> theme;
      std::vector<double> period;
      for (std::int64_t t = 0; t < length; ++t) {
        if (t % kThemeTokens == 0) theme = random.normals(key_width, DType::kF64, 0.5);
        for (std::int64_t i = 0; i < key_width; ++i) {
          const double fresh = theme[static_cast<std::size_t>(i)] + random.normal();
          const bool repeat = c.content == Content::kTies && t >= kThemeTokens;
          const double value =
              repeat ? k[static_cast<std::size_t>((t - kThemeTokens) * key_width + i)] : fresh;
          k.push_back(round_to(activation, value));
        }
      }
      return k;
    };
    SequenceNumbers n;
    n.k = keys();
    n.v = random.normals(length * key_width, activation);
    if (c.config.use_nope) n.k_score = keys();
    all.push_back(std::move(n));
  }
  return all;
}

void append_queries(const Case& c, std::int32_t sequence, std::int64_t position, Queries which,
                    DType activation, std::vector<double>& out) {
  const double scale = c.content == Content::kZero ? 0 : c.content == Content::kExtreme ? 30 : 1;
  Random key(c.seed + 500);
  Random random(key.next() ^ static_cast<std::uint64_t>((position * 64 + sequence) * 2 +
                                                        (which == Queries::kScore ? 1 : 0)));
  for (std::int64_t i = 0; i < std::int64_t{c.heads_q} * c.head_dim; ++i) {
    out.push_back(round_to(activation, scale * random.normal()));
  }
}

namespace {

template <typename T>
std::vector<std::byte> encode(std::span<const double> values) {
  std::vector<std::byte> bytes(values.size() * sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    T value;
    if constexpr (std::is_arithmetic_v<T>) {
      value = static_cast<T>(values[i]);
    } else {
      value = T(static_cast<float>(values[i]));
    }
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
  return bytes;
}

std::vector<std::byte> encode(std::span<const double> values, DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return encode<double>(values);
    case DType::kF32:
      return encode<float>(values);
    case DType::kBF16:
      return encode<BF16>(values);
    case DType::kF16:
      return encode<F16>(values);
    default:
      INFLLM_CHECK(false, "not a floating-point type");
  }
}

Buffer upload_bytes(const Backend& backend, const void* data, std::size_t bytes) {
  Buffer buffer = must(allocate(backend, bytes));
  const Status status = copy_in(backend, buffer.data(), data, bytes);
  INFLLM_CHECK(status.ok(), status.message());
  return buffer;
}

}  // namespace

Buffer upload(const Backend& backend, std::span<const double> values, DType dtype) {
  const std::vector<std::byte> bytes = encode(values, dtype);
  return upload_bytes(backend, bytes.data(), bytes.size());
}

Buffer upload(const Backend& backend, std::span<const std::int32_t> values) {
  return upload_bytes(backend, values.data(), values.size_bytes());
}

std::vector<double> download(const Backend& backend, const Buffer& buffer, std::int64_t count,
                             DType dtype) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * size_of(dtype)));
  const Status status = copy_out(backend, bytes.data(), buffer.data(), bytes.size());
  INFLLM_CHECK(status.ok(), status.message());
  std::vector<double> values(static_cast<std::size_t>(count));
  read_elements(TensorView::vector(bytes.data(), dtype, count), 0, count, values.data());
  return values;
}

Buffer poisoned(const Backend& backend, std::int64_t count, DType dtype) {
  if (std::getenv("INFLLM_UNPOISONED") != nullptr) {
    return must(allocate(backend, static_cast<std::size_t>(count * size_of(dtype))));
  }
  const std::vector<double> values(static_cast<std::size_t>(count), std::nan(""));
  return upload(backend, values, dtype);
}

}  // namespace infllm::testing
