// SPDX-License-Identifier: Apache-2.0
//
// The few formulas that the rows share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "infllm/backend/reference/rounding.h"

namespace infllm::reference {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The row as operand of products.
template <typename Real>
void round_row(const double* row, std::int64_t count, DType operand, Real* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<Real>(round_to(operand, row[i]));
}

// q . k; both are rounded already.
template <typename Real>
Real dot(const Real* q, const double* k, std::int64_t dim) {
  Real sum = 0;
  for (std::int64_t d = 0; d < dim; ++d) sum += q[d] * static_cast<Real>(k[d]);
  return sum;
}

// x[i] = exp(x[i] - M) with M = max x. Z = sum x[i] afterwards; log sum exp = M + log Z.
template <typename Real>
struct Softmax {
  Real max;
  Real sum;
};

template <typename Real>
Softmax<Real> exponentiate(Real* x, std::int64_t count) {
  Softmax<Real> s{-std::numeric_limits<Real>::infinity(), 0};
  for (std::int64_t i = 0; i < count; ++i) s.max = x[i] > s.max ? x[i] : s.max;
  for (std::int64_t i = 0; i < count; ++i) {
    x[i] = std::exp(x[i] - s.max);
    s.sum += x[i];
  }
  return s;
}

}  // namespace infllm::reference
