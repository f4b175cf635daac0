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
#include "infllm/ops/score_select.h"

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

// One layer's cache of one sequence, or of several that are alike. Everything that a step reads is
// in the backend's memory.
class Layer {
 public:
  static Result<Layer> create(const Backend& backend, const AttentionShape& shape,
                              const SparseConfig& config, DType dtype, std::int64_t tokens,
                              std::uint64_t seed, std::int32_t sequences = 1);

  // A step in which the last `count` of each sequence's `length` tokens are new. Valid until the
  // next call.
  Result<Batch> step(std::int64_t length, std::int64_t count, bool sparse);
  const KvPages& pages() const { return pages_; }

 private:
  Result<Batch> step_of(std::int32_t first, std::int32_t sequences, std::int64_t length,
                        std::int64_t count, bool sparse);

  Backend backend_;
  Buffer buffer_, plan_, page_table_;
  KvPages pages_;
  std::int32_t sequences_ = 1;
  std::int32_t blocks_ = 0;  // of a sequence
};

// Host floats as an array of the backend's activation type, or into a place of one.
Result<Buffer> upload(const Backend& backend, std::span<const float> values);
Status upload_to(const Backend& backend, void* to, std::span<const float> values);

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

// Queries [tokens, Hq, D] in the backend's memory. Beyond 64K tokens they repeat: as many more
// would take longer to make than to measure.
Result<Buffer> many_queries(const Backend& backend, const AttentionShape& shape, double correlation,
                            std::int64_t tokens, std::uint64_t seed);

// Steps 2 and 3 with the memory that they need: fused where the column has that, else one after the
// other.
class Chooser {
 public:
  static Result<Chooser> create(const Backend& backend, const AttentionShape& shape,
                                const SparseConfig& config, const KvPages& pages,
                                const Batch& batch);

  Status run(const Backend& backend, const void* q);
  const std::int32_t* selection() const { return params_.select.selection; }  // [Hkv, T, columns]
  std::int32_t columns() const { return params_.select.columns(); }
  Result<std::vector<std::int32_t>> read(const Backend& backend) const;  // the selection
  std::int64_t workspace_bytes() const { return workspace_.bytes() + scores_.bytes(); }

 private:
  ScoreSelectParams params_;
  bool fused_ = false;
  Buffer selection_, scores_, workspace_;
};

// neighbours_overlap() of the last tokens of a layer.
Result<double> measure_overlap(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double correlation);

// The correlation of queries that yields `overlap`.
Result<double> correlation_for(const Backend& backend, const AttentionShape& shape,
                               const SparseConfig& config, Layer& layer, std::int64_t length,
                               double overlap);

}  // namespace infllm::bench
