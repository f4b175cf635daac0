// SPDX-License-Identifier: Apache-2.0
//
// How the cpu columns keep a weight matrix: the same layout for every instruction set.
//
// Outputs are cut into panels of 64, and a panel is stored input by input, so that the outputs are
// the lanes of a vector and an activation is broadcast to them: no horizontal sums, and a decode
// step reads each panel from its first byte to its last.
//
//   kF32   [panels][inputs][64]          float
//   kBF16  [panels][inputs / 2][64][2]   two neighbouring inputs in one 32-bit lane (dot_pairs)
//   kI8    [panels] of { [inputs / 2][2][64] codes, [groups][64] float scales }
//          64 codes are two inputs of 32 outputs, ordered for unpacking within 128 bits
//          (code_place)
//
// Inputs are padded to an even number and outputs to a multiple of 64, both with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/ops/transformer.h"

namespace infllm::cpu {

inline constexpr std::int64_t kPanelOutputs = 64;

// Where the code of (input, output) lies in its panel. In each 16 bytes the lower half holds the
// pairs of outputs 4i .. 4i + 3 and the upper half those of outputs 16 + 4i ..: unpacking the lower
// halves of a 64-byte vector yields outputs 0 .. 15 in order, the upper halves outputs 16 .. 31.
constexpr std::int64_t code_place(std::int64_t input, std::int64_t output) {
  return input / 2 * 128 + output / 32 * 64 + output % 16 / 4 * 16 + output % 32 / 16 * 8 +
         output % 4 * 2 + input % 2;
}

struct PanelLayout {
  std::int64_t panels = 0;
  std::int64_t inputs = 0;        // padded
  std::int64_t group_inputs = 0;  // of kI8: inputs that share a scale
  std::int64_t groups = 0;        // of kI8, otherwise 0
  std::int64_t weight_bytes = 0;  // of one panel, without its scales
  std::int64_t panel_bytes = 0;   // with them
};

PanelLayout panel_layout(std::int64_t outputs, std::int64_t inputs, WeightFormat format,
                         std::int32_t group_size);
inline PanelLayout panel_layout(const LinearWeight& weight) {
  return panel_layout(weight.outputs, weight.inputs, weight.format, weight.group_size);
}

// The cell of every cpu column. kUnsupported: kF64, and groups of an odd number of inputs.
Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size);

// Keeps the view: the mapped file is the table.
Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table);

}  // namespace infllm::cpu
