// SPDX-License-Identifier: Apache-2.0
//
// Where weights come from, by name: a checkpoint's files, or a generator for benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/core/tensor.h"

namespace infllm::model {

// A tensor and whoever keeps its memory: hold the owner as long as the view is read.
struct WeightTensor {
  TensorView view;
  std::shared_ptr<const void> owner;
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // The element type of the tensor, if it exists with this shape and a floating-point type; its
  // memory is not touched. kNotFound or kDataError; messages name the tensor, what was found and
  // what was expected.
  virtual Result<DType> check(const std::string& name,
                              std::span<const std::int64_t> shape) const = 0;

  // The tensor, after the same checks.
  virtual Result<WeightTensor> tensor(const std::string& name,
                                      std::span<const std::int64_t> shape) const = 0;

  // Every name there is, sorted; a generator has none of its own.
  virtual std::vector<std::string> names() const = 0;

  // "MiniCPM4-8B/model.safetensors", "generated weights": for messages and `inspect`.
  virtual std::string description() const = 0;
};

// Deterministic noise of a trained model's magnitude: embeddings and head with standard deviation
// 0.1, other matrices 1 / sqrt(inputs), norms 1. bf16, one tensor at a time at the speed of memory:
// a row is a window of a fixed noise array, at an offset that name and row decide.
std::unique_ptr<WeightSource> synthetic_weights(std::uint64_t seed = 0);

}  // namespace infllm::model
