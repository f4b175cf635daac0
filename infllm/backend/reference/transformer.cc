// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/rows.h"

namespace infllm::reference {

Result<EmbeddingTable> upload_table(const Backend&, const TensorView& table) {
  return EmbeddingTable{.values = table};
}

Status embed(const Backend& backend, const EmbedParams& p, Workspace) {
  const Rounding rounding = rounding_of(backend);
  const std::int64_t width = p.table->values.shape[1];
  backend.pool->parallel_for(p.tokens, [&](std::int64_t t, int) {
    double* y = static_cast<double*>(p.y) + t * width;
    read_elements(p.table->values, p.token_ids[t] * width, width, y);
    for (std::int64_t i = 0; i < width; ++i) y[i] = round_to(rounding.output, p.scale * y[i]);
  });
  return {};
}

Status rms_norm(const Backend& backend, const RmsNormParams& p, Workspace) {
  const Rounding rounding = rounding_of(backend);
  const auto* weight = static_cast<const double*>(p.weight);
  with_accumulator(rounding, [&](auto zero) {
    using Real = decltype(zero);
    backend.pool->parallel_for(p.tokens, [&](std::int64_t t, int) {
      const double* x = static_cast<const double*>(p.x) + t * p.width;
      double* y = static_cast<double*>(p.y) + t * p.width;
      Real squares = 0;
      for (std::int64_t i = 0; i < p.width; ++i) {
        squares += static_cast<Real>(x[i]) * static_cast<Real>(x[i]);
      }
      const Real factor =
          Real{1} / std::sqrt(squares / static_cast<Real>(p.width) + static_cast<Real>(p.epsilon));
      for (std::int64_t i = 0; i < p.width; ++i) {
        const Real scaled = static_cast<Real>(x[i]) * factor * static_cast<Real>(weight[i]);
        y[i] = round_to(rounding.output, scaled);
      }
    });
  });
  return {};
}

Status rope_tables(const Backend& backend, const RopeTableParams& p, Workspace) {
  backend.pool->parallel_for(p.tokens, [&](std::int64_t t, int) { fill_rope_row(p, t); });
  return {};
}

Status rope(const Backend& backend, const RopeParams& p, Workspace) {
  const Rounding rounding = rounding_of(backend);
  const std::int64_t half = p.head_dim / 2;
  with_accumulator(rounding, [&](auto zero) {
    using Real = decltype(zero);
    backend.pool->parallel_for(p.tokens, [&](std::int64_t t, int) {
      for (std::int32_t head = 0; head < p.heads; ++head) {
        double* x = static_cast<double*>(p.x) + t * p.row_stride + std::int64_t{head} * p.head_dim;
        for (std::int64_t i = 0; i < half; ++i) {
          const Real cos = p.cos[t * half + i];
          const Real sin = p.sin[t * half + i];
          const auto a = static_cast<Real>(x[i]);
          const auto b = static_cast<Real>(x[i + half]);
          x[i] = round_to(rounding.output, a * cos - b * sin);
          x[i + half] = round_to(rounding.output, b * cos + a * sin);
        }
      }
    });
  });
  return {};
}

Status swiglu(const Backend& backend, const SwigluParams& p, Workspace) {
  const Rounding rounding = rounding_of(backend);
  with_accumulator(rounding, [&](auto zero) {
    using Real = decltype(zero);
    backend.pool->parallel_for(p.tokens, [&](std::int64_t t, int) {
      const double* gate = static_cast<const double*>(p.x) + t * 2 * p.width;
      const double* up = gate + p.width;
      double* y = static_cast<double*>(p.y) + t * p.width;
      for (std::int64_t i = 0; i < p.width; ++i) {
        const auto z = static_cast<Real>(gate[i]);
        const Real silu = z / (Real{1} + std::exp(-z));
        y[i] = round_to(rounding.output, silu * static_cast<Real>(up[i]));
      }
    });
  });
  return {};
}

Status gather(const Backend& backend, const GatherParams& p, Workspace) {
  backend.pool->parallel_for(p.count, [&](std::int64_t i, int) {
    const std::int64_t row = p.rows != nullptr ? p.rows[i] : i;
    std::copy_n(static_cast<const double*>(p.x) + row * p.row_stride + p.first_column, p.width,
                static_cast<double*>(p.y) + i * p.width);
  });
  return {};
}

}  // namespace infllm::reference
