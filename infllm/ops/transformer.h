// SPDX-License-Identifier: Apache-2.0
//
// Everything of a transformer layer that is not attention. x, y and h are in the backend's
// activation type; statistics and dot products accumulate in its accumulate type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/core/tensor.h"
#include "infllm/ops/backend.h"

namespace infllm {

// How a backend keeps a weight matrix.
//   kF32, kBF16: the values, bf16 rounded to nearest. A column that computes in 16 bits keeps its
//   own
//        16-bit type under either name.
//   kI8: round(w / s) in [-127, 127] with s = max |w| / 127 over group_size inputs of one output
//   row
//        (group_size 0: the whole row).
enum class WeightFormat : std::uint8_t { kF64, kF32, kBF16, kI8 };

// y = x W^T is all that anybody may do with it: storage order belongs to the backend.
struct LinearWeight {
  Buffer storage;
  std::int64_t outputs = 0;
  std::int64_t inputs = 0;
  WeightFormat format = WeightFormat::kF32;
  std::int32_t group_size = 0;  // of kI8

  // What a decode step reads of it.
  std::int64_t bytes() const { return static_cast<std::int64_t>(storage.bytes()); }
};

// Stacks matrices [outputs_i, inputs] (row-major f32, bf16, f16 or f64) on their outputs and packs
// them. Reference keeps kF64 whatever was asked, except that kI8 and kBF16 round the values first.
Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size = 0);

// The values of kI8, one by one, as every backend must see them: codes [outputs, inputs] and scales
// [outputs, ceil(inputs / group_size)]. Used by every backend's packing.
Status quantize_int8(const TensorView& matrix, std::int32_t group_size, std::int8_t* codes,
                     float* scales);

// y[T, outputs] = alpha x[T, inputs] W^T, added to y if accumulate. The residual stream's muP
// factor scale_depth / sqrt(layers) is alpha.
struct LinearParams {
  const LinearWeight* weight = nullptr;
  std::int64_t tokens = 0;
  const void* x = nullptr;
  void* y = nullptr;
  float alpha = 1;
  bool accumulate = false;
  // Neighbours of a product that some columns take into it, where linear_fuses(). x goes through
  // rms_norm() first, with these weights:
  const void* norm = nullptr;  // [inputs] accumulate type; null: x as it is
  float epsilon = 0;
  // The product goes through swiglu() afterwards: y is [T, outputs / 2]. Not with accumulate.
  bool gated = false;
};
// Whether linear() does what the parameters ask for beside the product.
bool linear_fuses(const Backend& backend, const LinearParams& params);
Status linear(const Backend& backend, const LinearParams& params, std::span<std::byte> workspace);
std::size_t linear_workspace_bytes(const Backend& backend, const LinearParams& params);

// A small vector of weights (a norm's), converted to the accumulate type.
Result<Buffer> upload_vector(const Backend& backend, const TensorView& vector);

// An embedding table [V, H]. A host backend keeps the view, so the memory behind it must live on.
struct EmbeddingTable {
  TensorView values;
  Buffer storage;  // empty when the view is used in place
};
Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table);

// y[t] = scale E[token[t]].
struct EmbedParams {
  const EmbeddingTable* table = nullptr;
  std::int64_t tokens = 0;
  const std::int32_t* token_ids = nullptr;  // [T] each in [0, V)
  float scale = 1;
  void* y = nullptr;  // [T, H]
};
Status embed(const Backend& backend, const EmbedParams& params);

// y[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight. y may be x.
struct RmsNormParams {
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  const void* x = nullptr;       // [T, H]
  const void* weight = nullptr;  // [H] accumulate type
  float epsilon = 0;
  void* y = nullptr;  // [T, H]
};
Status rms_norm(const Backend& backend, const RmsNormParams& params);

// The step's tables of cos and sin, computed once and read by every layer:
//
//   angle = position * scale_i * frequency_i      float32 products in this order
//   cos = factor cos(angle), sin = factor sin(angle)      computed in double, rounded to float32
//
// so every backend rotates alike. A token takes the second row of scales (LongRoPE's long factors)
// when its sequence is longer than switch_length.
struct RopeTableParams {
  std::int64_t tokens = 0;
  std::int32_t head_dim = 0;
  const std::int32_t* positions = nullptr;  // [T]
  const std::int32_t* lengths = nullptr;    // [T] tokens of the sequence; null: position + 1
  const float* scales = nullptr;            // [2, D / 2]
  const float* frequencies = nullptr;       // [D / 2]
  std::int32_t switch_length = 0;           // 0: the first row of scales for everybody
  float factor = 1;
  float* cos = nullptr;  // [T, D / 2]
  float* sin = nullptr;  // [T, D / 2]
};
Status rope_tables(const Backend& backend, const RopeTableParams& params);

// Row t of the tables, of arrays in host memory: the arithmetic of every host column.
void fill_rope_row(const RopeTableParams& params, std::int64_t t);

// Rotary embedding in the half-split (neox) layout, in place: with (a, b) = (x[i], x[i + D/2]) and
// the step's tables, (a cos - b sin, b cos + a sin).
struct RopeParams {
  std::int64_t tokens = 0;
  std::int32_t heads = 0;
  std::int32_t head_dim = 0;
  std::int64_t row_stride =
      0;                       // elements between tokens of x (a fused projection has more columns)
  void* x = nullptr;           // [T, heads, D]
  const float* cos = nullptr;  // [T, D / 2]
  const float* sin = nullptr;  // [T, D / 2]
};
Status rope(const Backend& backend, const RopeParams& params);

// y[t, i] = silu(x[t, i]) x[t, I + i], silu(z) = z / (1 + exp(-z)).
struct SwigluParams {
  std::int64_t tokens = 0;
  std::int64_t width = 0;   // I
  const void* x = nullptr;  // [T, 2 I]: gate, then up
  void* y = nullptr;        // [T, I]
};
Status swiglu(const Backend& backend, const SwigluParams& params);

// y[i] = x[rows[i]], columns first_column .. first_column + width - 1: picks the tokens that need
// logits, and cuts fused projections apart.
struct GatherParams {
  std::int64_t count = 0;
  std::int64_t width = 0;
  std::int64_t row_stride = 0;  // elements between rows of x
  std::int64_t first_column = 0;
  const std::int32_t* rows = nullptr;  // [count]; null: 0 .. count - 1
  const void* x = nullptr;
  void* y = nullptr;  // [count, width]
};
Status gather(const Backend& backend, const GatherParams& params);

// Host copy of `count` activation values as float: logits for the sampler.
Status read_floats(const Backend& backend, const void* x, std::int64_t count, float* out);

}  // namespace infllm
