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
//   kI8    [panels] of { [inputs / 4][64][4] codes, [groups][64] float scales }
//          the four codes of a lane are inputs 0, 2, 1, 3 of their quad: the even bytes make one
//          bf16 pair, the odd bytes the next
//
// Inputs are padded to a multiple of 4 and outputs to a multiple of 64, both with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/ops/transformer.h"

namespace infllm::cpu {

inline constexpr std::int64_t kPanelOutputs = 64;
inline constexpr std::int64_t kInputQuad = 4;

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

// The cell of every cpu column. kUnsupported: kF64, and groups that are no multiple of 4 inputs.
Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size);

// Keeps the view: the mapped file is the table.
Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table);

}  // namespace infllm::cpu
