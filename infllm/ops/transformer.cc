// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/transformer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "infllm/ops/check.h"

namespace infllm {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16 ||
         dtype == DType::kF16;
}

Status check_matrix(std::string_view step, const TensorView& m) {
  if (m.rank == 2 && m.shape[0] >= 1 && m.shape[1] >= 1 && is_float(m.dtype)) {
    return check_pointer(step, "data", m.data);
  }
  return invalid_argument(fmt::format(
      "{}: a {} tensor of shape {}, expected a non-empty matrix of f64, f32, bf16 or f16", step,
      name_of(m.dtype), shape_string(m)));
}

Status check_count(std::string_view step, std::string_view name, std::int64_t value,
                   std::int64_t low) {
  if (value >= low) return {};
  return invalid_argument(fmt::format("{}: {} = {}, expected at least {}", step, name, value, low));
}

Status check_group_size(std::string_view step, std::int32_t group_size, std::int64_t inputs) {
  if (group_size >= 0 && group_size <= inputs) return {};
  return invalid_argument(
      fmt::format("{}: group_size = {} for {} inputs, expected 0 (the whole row) to {}", step,
                  group_size, inputs, inputs));
}

Status check_pairs(std::string_view step, std::int32_t head_dim) {
  if (head_dim >= 2 && head_dim % 2 == 0) return {};
  return invalid_argument(
      fmt::format("{}: head_dim = {}, expected an even number: it rotates pairs", step, head_dim));
}

}  // namespace

Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size) {
  if (parts.empty()) return invalid_argument("pack_linear: no matrices, expected at least one");
  for (const TensorView& part : parts) {
    INFLLM_TRY(check_matrix("pack_linear", part));
    if (part.shape[1] != parts[0].shape[1]) {
      return invalid_argument(fmt::format(
          "pack_linear: matrices of shapes {} and {} do not stack; expected equal inputs",
          shape_string(parts[0]), shape_string(part)));
    }
  }
  INFLLM_TRY(check_group_size("pack_linear", group_size, parts[0].shape[1]));
  if (format != WeightFormat::kI8 && group_size != 0) {
    return invalid_argument(fmt::format(
        "pack_linear: group_size = {} for a format without scales, expected 0", group_size));
  }
  if (backend.kernels->pack_linear == nullptr) {
    return unsupported(fmt::format(
        "pack_linear: the device \"{}\" has no such step; open another one", backend.name));
  }
  return backend.kernels->pack_linear(backend, parts, format, group_size);
}

Status quantize_int8(const TensorView& matrix, std::int32_t group_size, std::int8_t* codes,
                     float* scales) {
  INFLLM_TRY(check_matrix("quantize_int8", matrix));
  const std::int64_t outputs = matrix.shape[0];
  const std::int64_t inputs = matrix.shape[1];
  INFLLM_TRY(check_group_size("quantize_int8", group_size, inputs));
  const std::int64_t group = group_size == 0 ? inputs : group_size;
  std::vector<float> row(static_cast<std::size_t>(inputs));
  for (std::int64_t output = 0; output < outputs; ++output) {
    read_elements(matrix, output * inputs, inputs, row.data());
    for (std::int64_t first = 0; first < inputs; first += group) {
      const std::int64_t last = std::min(first + group, inputs);
      float largest = 0;
      for (std::int64_t i = first; i < last; ++i) {
        if (!std::isfinite(row[i])) {
          return data_error(
              fmt::format("quantize_int8: {} at output {}, input {}, expected finite weights",
                          row[i], output, i));
        }
        largest = std::max(largest, std::fabs(row[i]));
      }
      const float scale = largest / 127.0f;
      *scales++ = scale;
      for (std::int64_t i = first; i < last; ++i) {
        // A scale that underflowed to zero, or to a subnormal with few bits, must not overflow.
        const float code = scale > 0 ? std::nearbyint(row[i] / scale) : 0.0f;
        *codes++ = static_cast<std::int8_t>(std::clamp(code, -127.0f, 127.0f));
      }
    }
  }
  return {};
}

bool linear_fuses(const Backend& backend, const LinearParams& params) {
  const Cell<LinearParams>& cell = backend.kernels->linear;
  return cell.covers != nullptr && cell.covers(backend, params);
}

Status linear(const Backend& backend, const LinearParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check_count("linear", "tokens", params.tokens, 0));
  INFLLM_TRY(check_pointer("linear", "weight", params.weight));
  if (params.weight->outputs < 1 || params.weight->inputs < 1) {
    return invalid_argument("linear: an empty weight; make it with pack_linear()");
  }
  if (!std::isfinite(params.alpha)) {
    return invalid_argument(
        fmt::format("linear: alpha = {}, expected a finite number", params.alpha));
  }
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("linear", "x", params.x));
  INFLLM_TRY(check_pointer("linear", "y", params.y));
  if ((params.norm != nullptr || params.gated) && !linear_fuses(backend, params)) {
    return unsupported(fmt::format(
        "linear: \"{}\" has no rms_norm() or swiglu() on the way of {} x {} to {} numbers; call "
        "them apart",
        backend.name, params.tokens, params.weight->inputs, params.weight->outputs));
  }
  return run_cell("linear", backend, backend.kernels->linear, params, workspace);
}

std::size_t linear_workspace_bytes(const Backend& backend, const LinearParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->linear, params);
}

Result<Buffer> upload_vector(const Backend& backend, const TensorView& vector) {
  if (vector.rank != 1 || vector.shape[0] < 1 || !is_float(vector.dtype)) {
    return invalid_argument(fmt::format(
        "upload_vector: a {} tensor of shape {}, expected a non-empty vector of f64, f32, bf16 or "
        "f16",
        name_of(vector.dtype), shape_string(vector)));
  }
  INFLLM_TRY(check_pointer("upload_vector", "data", vector.data));
  const std::int64_t count = vector.shape[0];
  const auto upload = [&](auto zero) -> Result<Buffer> {
    std::vector<decltype(zero)> host(static_cast<std::size_t>(count));
    read_elements(vector, 0, count, host.data());
    const std::size_t bytes = host.size() * sizeof(zero);
    Buffer buffer = INFLLM_TRY(allocate(backend, bytes));
    INFLLM_TRY(copy_in(backend, buffer.data(), host.data(), bytes));
    return buffer;
  };
  return backend.kernels->accumulate == DType::kF64 ? upload(0.0) : upload(0.0f);
}

Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table) {
  INFLLM_TRY(check_matrix("upload_table", table));
  if (backend.kernels->upload_table == nullptr) {
    return unsupported(fmt::format(
        "upload_table: the device \"{}\" has no such step; open another one", backend.name));
  }
  return backend.kernels->upload_table(backend, table);
}

Status embed(const Backend& backend, const EmbedParams& params) {
  INFLLM_TRY(check_count("embed", "tokens", params.tokens, 0));
  INFLLM_TRY(check_pointer("embed", "table", params.table));
  INFLLM_TRY(check_matrix("embed", params.table->values));
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("embed", "token_ids", params.token_ids));
  INFLLM_TRY(check_pointer("embed", "y", params.y));
  return run_cell("embed", backend, backend.kernels->embed, params, {});
}

Status rms_norm(const Backend& backend, const RmsNormParams& params) {
  INFLLM_TRY(check_count("rms_norm", "tokens", params.tokens, 0));
  INFLLM_TRY(check_count("rms_norm", "width", params.width, 1));
  if (!(params.epsilon >= 0) || !std::isfinite(params.epsilon)) {
    return invalid_argument(fmt::format(
        "rms_norm: epsilon = {}, expected a small number that is not negative", params.epsilon));
  }
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("rms_norm", "x", params.x));
  INFLLM_TRY(check_pointer("rms_norm", "weight", params.weight));
  INFLLM_TRY(check_pointer("rms_norm", "y", params.y));
  return run_cell("rms_norm", backend, backend.kernels->rms_norm, params, {});
}

Status rope_tables(const Backend& backend, const RopeTableParams& params) {
  INFLLM_TRY(check_count("rope_tables", "tokens", params.tokens, 0));
  INFLLM_TRY(check_pairs("rope_tables", params.head_dim));
  if (!std::isfinite(params.factor)) {
    return invalid_argument(
        fmt::format("rope_tables: factor = {}, expected a finite number", params.factor));
  }
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("rope_tables", "positions", params.positions));
  INFLLM_TRY(check_pointer("rope_tables", "scales", params.scales));
  INFLLM_TRY(check_pointer("rope_tables", "frequencies", params.frequencies));
  INFLLM_TRY(check_pointer("rope_tables", "cos", params.cos));
  INFLLM_TRY(check_pointer("rope_tables", "sin", params.sin));
  return run_cell("rope_tables", backend, backend.kernels->rope_tables, params, {});
}

void fill_rope_row(const RopeTableParams& p, std::int64_t t) {
  const std::int64_t half = p.head_dim / 2;
  const std::int32_t position = p.positions[t];
  const std::int64_t length = p.lengths != nullptr ? p.lengths[t] : std::int64_t{position} + 1;
  const bool is_long = p.switch_length > 0 && length > p.switch_length;
  const float* scale = p.scales + (is_long ? half : 0);
  for (std::int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * scale[i] * p.frequencies[i];
    p.cos[t * half + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * p.factor;
    p.sin[t * half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * p.factor;
  }
}

Status rope(const Backend& backend, const RopeParams& params) {
  INFLLM_TRY(check_count("rope", "tokens", params.tokens, 0));
  INFLLM_TRY(check_count("rope", "heads", params.heads, 1));
  INFLLM_TRY(check_pairs("rope", params.head_dim));
  const std::int64_t columns = std::int64_t{params.heads} * params.head_dim;
  INFLLM_TRY(
      check_count("rope", "row_stride (heads * head_dim or more)", params.row_stride, columns));
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("rope", "x", params.x));
  INFLLM_TRY(check_pointer("rope", "cos", params.cos));
  INFLLM_TRY(check_pointer("rope", "sin", params.sin));
  return run_cell("rope", backend, backend.kernels->rope, params, {});
}

Status swiglu(const Backend& backend, const SwigluParams& params) {
  INFLLM_TRY(check_count("swiglu", "tokens", params.tokens, 0));
  INFLLM_TRY(check_count("swiglu", "width", params.width, 1));
  if (params.tokens == 0) return {};
  INFLLM_TRY(check_pointer("swiglu", "x", params.x));
  INFLLM_TRY(check_pointer("swiglu", "y", params.y));
  return run_cell("swiglu", backend, backend.kernels->swiglu, params, {});
}

Status gather(const Backend& backend, const GatherParams& params) {
  INFLLM_TRY(check_count("gather", "count", params.count, 0));
  INFLLM_TRY(check_count("gather", "width", params.width, 1));
  INFLLM_TRY(check_count("gather", "first_column", params.first_column, 0));
  INFLLM_TRY(check_count("gather", "row_stride (first_column + width or more)", params.row_stride,
                         params.first_column + params.width));
  if (params.count == 0) return {};
  INFLLM_TRY(check_pointer("gather", "x", params.x));
  INFLLM_TRY(check_pointer("gather", "y", params.y));
  return run_cell("gather", backend, backend.kernels->gather, params, {});
}

Status read_floats(const Backend& backend, const void* x, std::int64_t count, float* out) {
  INFLLM_TRY(check_count("read_floats", "count", count, 0));
  const DType dtype = backend.kernels->activation;
  const std::size_t bytes = static_cast<std::size_t>(count * size_of(dtype));
  if (dtype == DType::kF32) return copy_out(backend, out, x, bytes);
  std::vector<std::byte> host(bytes);
  INFLLM_TRY(copy_out(backend, host.data(), x, bytes));
  read_elements(TensorView::vector(host.data(), dtype, count), 0, count, out);
  return {};
}

}  // namespace infllm
