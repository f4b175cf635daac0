// SPDX-License-Identifier: Apache-2.0
//
// The running soft-max of a row over tiles of 64 logits s, in base 2 with c = scale log2(e):
//
//   m' = max(m, c max s)    w = 2^(m - m')   P = 2^(c s - m')   l' = w l + sum P   o' = w o + P V
//
// l is kept as one vector of partial sums a row and added up once at the end; m starts at a large
// negative number instead of -inf, so that no difference is undefined.
#pragma once

#include <cmath>
#include <limits>

#include "infllm/backend/cpu/exp-inl.h"
#include "infllm/backend/cpu/tile-inl.h"

INFLLM_CPU_BEGIN

inline constexpr float kNoMaximum = -1e30f;
inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

struct RunningSoftmax {
  float* m;  // [rows]
  float* l;  // [rows, kLanes]

  void reset(std::int64_t rows) const {
    std::fill(m, m + rows, kNoMaximum);
    std::fill(l, l + rows * kLanes, 0.0f);
  }
  // The sum of the weights, relative to 2^m.
  float sum(std::int64_t row) const {
    return hn::GetLane(hn::SumOfLanes(F32(), hn::LoadU(F32(), l + row * kLanes)));
  }
};

// Lanes at or after `limit` of 64 logits become -inf.
HWY_INLINE void mask_after(float* s, int limit) {
  std::fill(s + limit, s + kPageTokens, -std::numeric_limits<float>::infinity());
}

// A tile holds a logit that is larger than m: raises m to its maximum and rescales l and, if it is
// not null, o [dim]. Rare after the first tiles, so it is a branch instead of a factor for every
// row and tile. (A maximum that may lag, by a factor of 2^8 say, would be rarer still, but then the
// heaviest weight is no longer exactly 1 and its rounding to bf16 triples the error of peaked
// rows.)
inline void raise_maximum(const RunningSoftmax& state, std::int64_t row, float maximum, float* o,
                          std::int64_t dim) {
  const F32 d;
  const VF32 factor = exp2(hn::Set(d, state.m[row] - maximum));
  state.m[row] = maximum;
  float* l = state.l + row * kLanes;
  hn::StoreU(hn::Mul(hn::LoadU(d, l), factor), d, l);
  for (std::int64_t i = 0; o != nullptr && i < dim; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, o + i), factor), d, o + i);
  }
}

// Takes one tile of logits s [n, 64] into the rows row[0], row[1], ... Writes the weights as
// elements [n, 64] to p and rescales o [rows, dim]; both may be null together.
template <class Num>
void update_softmax(const RunningSoftmax& state, int n, const std::int32_t* row, const float* s,
                    float c, typename Num::Element* p, float* o, std::int64_t dim) {
  const F32 d;
  const VF32 vc = hn::Set(d, c);
  for (int i = 0; i < n; ++i) {
    const float* x = s + i * kPageTokens;
    VF32 top = hn::LoadU(d, x);
    for (int j = kLanes; j < kPageTokens; j += kLanes) top = hn::Max(top, hn::LoadU(d, x + j));
    top = hn::Mul(top, vc);
    if (!hn::AllFalse(d, hn::Gt(top, hn::Set(d, state.m[row[i]])))) {
      raise_maximum(state, row[i], hn::GetLane(hn::MaxOfLanes(d, top)),
                    o == nullptr ? nullptr : o + row[i] * dim, dim);
    }
    const VF32 m = hn::Set(d, state.m[row[i]]);
    float* l = state.l + std::int64_t{row[i]} * kLanes;
    VF32 sum = hn::LoadU(d, l);
    for (int j = 0; j < kPageTokens; j += 2 * kLanes) {
      const VF32 low = exp2(hn::MulSub(hn::LoadU(d, x + j), vc, m));
      const VF32 high = exp2(hn::MulSub(hn::LoadU(d, x + j + kLanes), vc, m));
      sum = hn::Add(sum, hn::Add(low, high));
      if (p != nullptr) store_elements(low, high, p + (i * kPageTokens + j) / Num::kPer);
    }
    hn::StoreU(sum, d, l);
  }
}

INFLLM_CPU_END
