// SPDX-License-Identifier: Apache-2.0
//
// Synthetic attention inputs: one layer's cache filled with keys that have topics, and queries
// whose selections overlap between neighbouring tokens as much as one asks for.
//
// A key is a topic shared by 16 neighbouring tokens plus noise, so pooled keys keep a signal. Query
// t is r times query t-1 plus fresh noise; r is found by bisection so that neighbours share the
// wanted part of their freely chosen blocks (0.9 to 0.7 is what published measurements of trained
// models suggest). r = 0 is "random": what most kernel benchmarks use, and the least favourable
// input.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infllm/ops/attention.h"
#include "infllm/ops/backend.h"

namespace infllm::bench {

struct AttentionShape {
  std::string_view name;
  std::int32_t heads_q;
  std::int32_t heads_kv;
  std::int32_t head_dim;
};

inline constexpr AttentionShape kShapes[] = {
    {"minicpm4-0.5b", 16, 2, 64},
    {"minicpm4.1-8b", 32, 2, 128},
};

// A generator of normal-like numbers (the sum of four uniform ones) that fills gigabytes in
// seconds.
class Noise {
 public:
  explicit Noise(std::uint64_t seed) : state_(seed * 2 + 1) {}
  float next();

 private:
  std::uint64_t state_;
};

// One layer's cache of one sequence.
class Layer {
 public:
  static Result<Layer> create(const Backend& backend, const AttentionShape& shape,
                              const SparseConfig& config, DType dtype, std::int64_t tokens,
                              std::uint64_t seed);

  // A step in which the last `count` of `length` tokens are new. Valid until the next call.
  const Batch& step(std::int64_t length, std::int64_t count, bool sparse);
  const KvPages& pages() const { return pages_; }

 private:
  Buffer buffer_;
  KvPages pages_;
  std::vector<std::int32_t> page_table_;
  std::int32_t query_start_[2] = {0, 0};
  std::int32_t kv_length_ = 0;
  std::uint8_t sparse_ = 0;
  Batch batch_;
};

// Queries of neighbouring tokens, one chunk after the other.
class Queries {
 public:
  Queries(const AttentionShape& shape, double correlation, std::uint64_t seed);
  void fill(std::span<float> q);  // [tokens, Hq, D]

 private:
  Noise noise_;
  float keep_;
  float fresh_;
  std::vector<float> last_;
};

// The share of freely chosen blocks that a token's selection has in common with its neighbour's,
// over the last tokens of a layer.
Result<double> measure_overlap(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double correlation);

// The correlation of queries that yields `overlap`.
Result<double> correlation_for(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double overlap);

}  // namespace infllm::bench
