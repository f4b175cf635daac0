// SPDX-License-Identifier: Apache-2.0
//
// A weight is [outputs, inputs] doubles: the values as the other columns see them after their
// rounding.
#include <vector>

#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/core/arena.h"

namespace infllm::reference {
namespace {

// values[i] = code[i] scale of its group: what int8 weights stand for.
Status read_int8(const TensorView& part, std::int32_t group_size, double* values) {
  const std::int64_t inputs = part.shape[1];
  const std::int64_t group = group_size == 0 ? inputs : group_size;
  std::vector<std::int8_t> codes(static_cast<std::size_t>(part.elements()));
  std::vector<float> scales(static_cast<std::size_t>(part.shape[0] * ceil_div(inputs, group)));
  INFLLM_TRY(quantize_int8(part, group_size, codes.data(), scales.data()));
  for (std::int64_t i = 0; i < part.elements(); ++i) {
    const std::int64_t scale = i / inputs * ceil_div(inputs, group) + i % inputs / group;
    values[i] = static_cast<double>(codes[i]) * static_cast<double>(scales[scale]);
  }
  return {};
}

}  // namespace

Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size) {
  LinearWeight weight{.inputs = parts[0].shape[1], .format = format, .group_size = group_size};
  for (const TensorView& part : parts) weight.outputs += part.shape[0];
  const std::int64_t elements = weight.outputs * weight.inputs;
  weight.storage =
      INFLLM_TRY(allocate(backend, static_cast<std::size_t>(elements) * sizeof(double)));
  auto* values = weight.storage.as<double>();
  for (const TensorView& part : parts) {
    if (format == WeightFormat::kI8) {
      INFLLM_TRY(read_int8(part, group_size, values));
    } else {
      read_elements(part, 0, part.elements(), values);
      const DType dtype = format == WeightFormat::kBF16 ? DType::kBF16 : DType::kF64;
      for (std::int64_t i = 0; i < part.elements(); ++i) values[i] = round_to(dtype, values[i]);
    }
    values += part.elements();
  }
  return weight;
}

Status linear(const Backend& backend, const LinearParams& p, Workspace workspace) {
  const Rounding rounding = rounding_of(backend);
  const std::int64_t outputs = p.weight->outputs;
  const std::int64_t inputs = p.weight->inputs;
  const auto* w = p.weight->storage.as<double>();
  auto* y = static_cast<double*>(p.y);
  with_accumulator(rounding, [&](auto zero) {
    using Real = decltype(zero);
    Arena arena(workspace);
    Real* x = arena.take<Real>(p.tokens * inputs);
    round_row(static_cast<const double*>(p.x), p.tokens * inputs, rounding.operand, x);
    backend.pool->parallel_for(outputs, [&](std::int64_t output, int) {
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        const Real sum = dot<Real>(x + t * inputs, w + output * inputs, inputs);
        double& out = y[t * outputs + output];
        const Real old = p.accumulate ? static_cast<Real>(out) : Real{0};
        out = round_to(rounding.output, old + static_cast<Real>(p.alpha) * sum);
      }
    });
  });
  return {};
}

std::size_t linear_workspace_bytes(const Backend&, const LinearParams& p) {
  ArenaSize size;
  size.take<double>(p.tokens * p.weight->inputs);
  return size.bytes();
}

}  // namespace infllm::reference
