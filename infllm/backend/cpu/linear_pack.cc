// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cpu/linear_pack.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "infllm/ops/kernels.h"

namespace infllm::cpu {
namespace {

constexpr std::int64_t kChunk = 64;  // inputs that a panel's rows are transposed by

// One row of the stacked matrix.
struct Row {
  const TensorView* part = nullptr;  // null: padding
  std::int64_t index = 0;
};

Row row_of(std::span<const TensorView> parts, std::int64_t output) {
  for (const TensorView& part : parts) {
    if (output < part.shape[0]) return {&part, output};
    output -= part.shape[0];
  }
  return {};
}

void read_row(const Row& row, std::int64_t first, std::int64_t count, float* out) {
  if (row.part == nullptr) {
    std::fill_n(out, count, 0.0f);
  } else {
    read_elements(*row.part, row.index * row.part->shape[1] + first, count, out);
  }
}

void read_row(const Row& row, std::int64_t first, std::int64_t count, BF16* out) {
  if (row.part != nullptr && row.part->dtype == DType::kBF16) {
    const auto* data = static_cast<const std::byte*>(row.part->data);
    std::memcpy(out, data + (row.index * row.part->shape[1] + first) * 2,
                static_cast<std::size_t>(count) * 2);
    return;
  }
  float values[kChunk];
  read_row(row, first, count, values);
  for (std::int64_t i = 0; i < count; ++i) out[i] = BF16(values[i]);
}

// A panel of Out values, kLane of them in one 32-bit lane: float one, BF16 two.
template <typename Out>
void pack_panel(std::span<const TensorView> parts, std::int64_t panel, std::int64_t inputs,
                std::int64_t padded, std::byte* out) {
  constexpr std::int64_t kLane = 4 / sizeof(Out);
  Out rows[kPanelOutputs][kChunk];
  for (std::int64_t first = 0; first < padded; first += kChunk) {
    const std::int64_t columns = std::min(kChunk, padded - first);
    const std::int64_t filled = std::clamp<std::int64_t>(inputs - first, 0, columns);
    for (std::int64_t r = 0; r < kPanelOutputs; ++r) {
      read_row(row_of(parts, panel * kPanelOutputs + r), first, filled, rows[r]);
      std::fill(rows[r] + filled, rows[r] + columns, Out(0.0f));
    }
    std::byte* lanes = out + first * kPanelOutputs * static_cast<std::int64_t>(sizeof(Out));
    for (std::int64_t k = 0; k < columns; k += kLane) {
      for (std::int64_t r = 0; r < kPanelOutputs; ++r, lanes += 4) {
        std::memcpy(lanes, &rows[r][k], 4);
      }
    }
  }
}

// The 64 rows of a panel are gathered as a matrix of their own for ops' quantize_int8: parts may
// meet within a panel.
Status pack_int8_panel(std::span<const TensorView> parts, std::int64_t panel,
                       const LinearWeight& weight, const PanelLayout& layout, std::byte* out) {
  const std::int64_t inputs = weight.inputs;
  const std::int64_t rows = std::min(kPanelOutputs, weight.outputs - panel * kPanelOutputs);
  std::vector<float> matrix(static_cast<std::size_t>(rows * inputs));
  for (std::int64_t r = 0; r < rows; ++r) {
    read_row(row_of(parts, panel * kPanelOutputs + r), 0, inputs, &matrix[r * inputs]);
  }
  std::vector<std::int8_t> codes(matrix.size());
  std::vector<float> scales(static_cast<std::size_t>(rows * layout.groups));
  INFLLM_TRY(quantize_int8(TensorView::matrix(matrix.data(), DType::kF32, rows, inputs),
                           weight.group_size, codes.data(), scales.data()));
  std::memset(out, 0, static_cast<std::size_t>(layout.panel_bytes));
  auto* packed = reinterpret_cast<std::int8_t*>(out);
  auto* packed_scales = reinterpret_cast<float*>(out + layout.weight_bytes);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < inputs; ++k) {
      packed[code_place(k, r)] = codes[r * inputs + k];
    }
    for (std::int64_t g = 0; g < layout.groups; ++g) {
      packed_scales[g * kPanelOutputs + r] = scales[r * layout.groups + g];
    }
  }
  return {};
}

Status check_format(WeightFormat format, std::int32_t group_size) {
  if (format == WeightFormat::kF64) {
    return unsupported("pack_linear: f64 weights live on the device \"reference\"; ask for f32");
  }
  if (format == WeightFormat::kI8 && group_size % 2 != 0) {
    return unsupported(fmt::format(
        "pack_linear: group_size = {}, expected an even number (or 0: one scale per output)",
        group_size));
  }
  return {};
}

}  // namespace

PanelLayout panel_layout(std::int64_t outputs, std::int64_t inputs, WeightFormat format,
                         std::int32_t group_size) {
  PanelLayout layout;
  layout.panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  layout.inputs = (inputs + 1) / 2 * 2;
  std::int64_t value_bytes = 4;
  if (format == WeightFormat::kBF16) value_bytes = 2;
  if (format == WeightFormat::kI8) {
    value_bytes = 1;
    layout.group_inputs = group_size > 0 ? group_size : layout.inputs;
    layout.groups = (inputs + layout.group_inputs - 1) / layout.group_inputs;
  }
  layout.weight_bytes = layout.inputs * kPanelOutputs * value_bytes;
  layout.panel_bytes = layout.weight_bytes + layout.groups * kPanelOutputs * 4;
  return layout;
}

Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size) {
  INFLLM_TRY(check_format(format, group_size));
  LinearWeight weight;
  weight.inputs = parts[0].shape[1];
  for (const TensorView& part : parts) weight.outputs += part.shape[0];
  weight.format = format;
  weight.group_size = format == WeightFormat::kI8 ? group_size : 0;
  const PanelLayout layout = panel_layout(weight);
  weight.storage = INFLLM_TRY(backend.kernels->allocate(
      backend, static_cast<std::size_t>(layout.panels * layout.panel_bytes)));

  std::vector<Status> failures(static_cast<std::size_t>(layout.panels));
  backend.pool->parallel_for(layout.panels, [&](std::int64_t panel, int) {
    std::byte* out = weight.storage.data() + panel * layout.panel_bytes;
    switch (format) {
      case WeightFormat::kBF16:
        return pack_panel<BF16>(parts, panel, weight.inputs, layout.inputs, out);
      case WeightFormat::kI8:
        failures[panel] = pack_int8_panel(parts, panel, weight, layout, out);
        return;
      default:
        return pack_panel<float>(parts, panel, weight.inputs, layout.inputs, out);
    }
  });
  for (const Status& failure : failures) {
    if (!failure.ok()) return failure;
  }
  return weight;
}

Result<EmbeddingTable> upload_table(const Backend&, const TensorView& table) {
  return EmbeddingTable{.values = table, .storage = {}};
}

}  // namespace infllm::cpu
