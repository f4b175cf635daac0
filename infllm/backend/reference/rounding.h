// SPDX-License-Identifier: Apache-2.0
//
// Where an honest kernel rounds. The reference computes exactly (in double) unless it is opened
// with a rounding: then operands of products (q, P, x) are rounded to `operand`, what a step hands
// to the next one (o, y) to `output`, and sums are kept in float, like a kernel's accumulators. The
// difference between the two runs is the error that a kernel is allowed (docs/numerics.md).
//
// The cache is rounded to KvLayout.dtype in either case: it is storage, and the exact column must
// see the numbers that the kernel sees.
#pragma once

#include "infllm/core/dtype.h"
#include "infllm/ops/backend.h"

namespace infllm::reference {

struct Rounding {
  DType operand = DType::kF64;
  DType output = DType::kF64;
  bool exact() const { return operand == DType::kF64; }
};

inline double round_to(DType dtype, double value) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<double>(static_cast<float>(value));
    case DType::kBF16:
      return round_to_bf16(value);
    case DType::kF16:
      return static_cast<double>(static_cast<float>(F16(static_cast<float>(value))));
    default:
      return value;
  }
}

// Backend.state of this column holds a Rounding, or nothing: exact.
inline Rounding rounding_of(const Backend& backend) {
  return backend.state == nullptr ? Rounding() : *static_cast<const Rounding*>(backend.state.get());
}

// body(Real()): with the type that sums are kept in.
template <typename Body>
void with_accumulator(const Rounding& rounding, Body&& body) {
  if (rounding.exact()) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace infllm::reference
