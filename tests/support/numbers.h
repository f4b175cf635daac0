// SPDX-License-Identifier: Apache-2.0
//
// The numbers of a test: reproducible from a seed on every machine, and carried as doubles that are
// representable in the type that the backend under test computes with, so that every backend and
// the reference see the same input.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infllm/core/dtype.h"
#include "infllm/ops/backend.h"
#include "tests/support/cases.h"

namespace infllm::testing {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();                    // splitmix64
  double normal();                         // nearly: mean 0, variance 1, within 3.5
  std::int64_t below(std::int64_t limit);  // [0, limit)
  std::vector<double> normals(std::int64_t count, DType dtype, double scale = 1);

 private:
  std::uint64_t state_;
};

// What one sequence caches, [length, Hkv, D] each. k_score is empty unless the case uses it.
struct SequenceNumbers {
  std::vector<double> k, v, k_score;
};
std::vector<SequenceNumbers> numbers_of(const Case& c, DType activation);

// Appends the queries [Hq, D] of one token, as attended with or (use_nope) as scored with.
enum class Queries { kAttend, kScore };
void append_queries(const Case& c, std::int32_t sequence, std::int64_t position, Queries which,
                    DType activation, std::vector<double>& out);

// Host doubles to and from an array of a backend.
Buffer upload(const Backend& backend, std::span<const double> values, DType dtype);
Buffer upload(const Backend& backend, std::span<const std::int32_t> values);
std::vector<double> download(const Backend& backend, const Buffer& buffer, std::int64_t count,
                             DType dtype);
// An output array full of NaN, so that what nobody wrote shows. With INFLLM_UNPOISONED in the
// environment it is left as it comes, for compute-sanitizer's initcheck (tests/cuda/poison.h).
Buffer poisoned(const Backend& backend, std::int64_t count, DType dtype);

}  // namespace infllm::testing
