// SPDX-License-Identifier: Apache-2.0
//
// Weights are kept in the column's 16-bit type, whatever the checkpoint holds, as rows of whole
// 16-byte units: y = x W^T is then one call of cuBLASLt.
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/plain_linear.h"
#include "infllm/backend/cuda/rows.h"
#include "infllm/core/arena.h"

namespace infllm::cuda {
namespace {

constexpr std::int64_t kRowUnit = 8;                           // elements of 16 bytes
constexpr std::int64_t kStagedBytes = std::int64_t{64} << 20;  // of a matrix that is converted

std::int64_t row_stride(std::int64_t inputs) { return ceil_div(inputs, kRowUnit) * kRowUnit; }

// A host matrix as the column's type at `to`, rows `stride` elements apart.
Status upload_matrix(const Backend& backend, const TensorView& matrix, std::int64_t stride,
                     std::byte* to) {
  const Device& device = device_of(backend);
  const DType type = backend.kernels->activation;
  const std::int64_t rows = matrix.shape[0];
  const std::int64_t width = matrix.shape[1];
  if (matrix.dtype == type && stride == width) {
    return copy_in(backend, to, matrix.data, static_cast<std::size_t>(matrix.bytes()));
  }
  // float64 is narrowed on the way; the other types are converted on the device.
  const DType staged = matrix.dtype == DType::kF64 ? DType::kF32 : matrix.dtype;
  const std::int64_t row_bytes = width * size_of(staged);
  const std::int64_t tile = std::clamp<std::int64_t>(kStagedBytes / row_bytes, 1, rows);
  const Buffer stage = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(tile * row_bytes)));
  std::vector<float> narrow;
  for (std::int64_t first = 0; first < rows; first += tile) {
    const std::int64_t count = std::min(tile, rows - first);
    const void* source =
        static_cast<const std::byte*>(matrix.data) + first * width * size_of(matrix.dtype);
    if (matrix.dtype == DType::kF64) {
      narrow.resize(static_cast<std::size_t>(count * width));
      read_elements(matrix, first * width, count * width, narrow.data());
      source = narrow.data();
    }
    INFLLM_TRY(copy_in(backend, stage.data(), source, static_cast<std::size_t>(count * row_bytes)));
    INFLLM_TRY(convert(device, staged, stage.data(), type, count, width, stride,
                       to + first * stride * size_of(type)));
  }
  return synchronize(backend);  // before the stage goes
}

}  // namespace

Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t) {
  if (format == WeightFormat::kI8 || format == WeightFormat::kF64) {
    return unsupported(fmt::format(
        "pack_linear: {} weights on \"{}\", which keeps {}; the cpu device has int8, the reference "
        "f64",
        format == WeightFormat::kI8 ? "int8" : "f64", backend.name,
        name_of(backend.kernels->activation)));
  }
  INFLLM_TRY(device_of(backend).blas->load());
  const std::int64_t inputs = parts[0].shape[1];
  LinearWeight weight{.inputs = inputs, .format = WeightFormat::kBF16};
  for (const TensorView& part : parts) weight.outputs += part.shape[0];
  const std::int64_t row_bytes = row_stride(inputs) * size_of(backend.kernels->activation);
  weight.storage =
      INFLLM_TRY(allocate(backend, static_cast<std::size_t>(weight.outputs * row_bytes)));
  std::byte* to = weight.storage.data();
  for (const TensorView& part : parts) {
    INFLLM_TRY(upload_matrix(backend, part, row_stride(inputs), to));
    to += part.shape[0] * row_bytes;
  }
  // Kernels read weights before the work in front of them is done.
  INFLLM_TRY(synchronize(backend));
  return weight;
}

std::size_t linear_workspace_bytes(const Backend&, const LinearParams& p) {
  return p.tokens == 0 ? 0 : kBlasWorkspaceBytes + kBlasWorkspaceAlignment;
}

Status linear(const Backend& backend, const LinearParams& p, Workspace workspace) {
  const Device& device = device_of(backend);
  Product product{.dtype = backend.kernels->activation,
                  .tokens = p.tokens,
                  .outputs = p.weight->outputs,
                  .inputs = p.weight->inputs,
                  .x = p.x,
                  .weight = p.weight->storage.data(),
                  .weight_stride = row_stride(p.weight->inputs),
                  .y = p.y,
                  .alpha = p.alpha,
                  .beta = p.accumulate ? 1.0f : 0.0f};
  if (product.inputs % kRowUnit != 0 || product.outputs % kRowUnit != 0) {
    return plain_product(device, product);
  }
  if (!workspace.empty()) {
    const auto address = reinterpret_cast<std::uintptr_t>(workspace.data());
    product.workspace = workspace.subspan(align_up(address, kBlasWorkspaceAlignment) - address,
                                          kBlasWorkspaceBytes);
  }
  return device.blas->multiply(device, product);
}

Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table) {
  const std::int64_t width = table.shape[1];
  const DType type = backend.kernels->activation;
  EmbeddingTable uploaded;
  uploaded.storage =
      INFLLM_TRY(allocate(backend, static_cast<std::size_t>(table.elements() * size_of(type))));
  INFLLM_TRY(upload_matrix(backend, table, width, uploaded.storage.data()));
  uploaded.values = TensorView::matrix(uploaded.storage.data(), type, table.shape[0], width);
  return uploaded;
}

}  // namespace infllm::cuda
