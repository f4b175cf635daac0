// SPDX-License-Identifier: Apache-2.0
//
// Tiles of the cache in the other order. The products of tile-inl.h want neighbouring values along
// the sum in one element; what forward products sum over, backward ones do not (page.h says how
// pages are laid out).
#pragma once

#include "infllm/backend/cpu/tile-inl.h"

INFLLM_CPU_BEGIN

// Keys [D / per][64] as values [64 / per][D].
template <class Num>
void turn_keys(const typename Num::Element* keys, std::int64_t dim, typename Num::Element* to) {
  for (std::int64_t t = 0; t < kPageTokens; ++t) {
    if constexpr (Num::kPer == 1) {
      for (std::int64_t d = 0; d < dim; ++d) to[t * dim + d] = keys[d * kPageTokens + t];
    } else {
      if (t % 2 != 0) continue;
      typename Num::Element* row = to + t / 2 * dim;
      for (std::int64_t d = 0; d < dim; d += 2) {
        const auto first = keys[d / 2 * kPageTokens + t];
        const auto second = keys[d / 2 * kPageTokens + t + 1];
        row[d] = (first & 0xffffu) | second << 16;
        row[d + 1] = first >> 16 | (second & 0xffff0000u);
      }
    }
  }
}

// Values [64 / per][D] as keys [D / per][64].
template <class Num>
void turn_values(const typename Num::Element* values, std::int64_t dim, typename Num::Element* to) {
  for (std::int64_t t = 0; t < kPageTokens; t += Num::kPer) {
    const typename Num::Element* row = values + t / Num::kPer * dim;
    for (std::int64_t d = 0; d < dim; d += Num::kPer) {
      if constexpr (Num::kPer == 1) {
        to[d * kPageTokens + t] = row[d];
      } else {
        typename Num::Element* column = to + d / 2 * kPageTokens + t;
        column[0] = (row[d] & 0xffffu) | row[d + 1] << 16;
        column[1] = row[d] >> 16 | (row[d + 1] & 0xffff0000u);
      }
    }
  }
}

// Rows [count, D / per] as values [ceil(count / per), D]; a missing second row is zero.
template <class Num>
void pair_rows(const typename Num::Element* rows, int count, std::int64_t dim,
               typename Num::Element* to) {
  if constexpr (Num::kPer == 1) {
    std::copy_n(rows, count * dim, to);
  } else {
    const std::int64_t half = dim / 2;
    for (int r = 0; r < count; r += 2) {
      const typename Num::Element* first = rows + r * half;
      typename Num::Element* pair = to + r / 2 * dim;
      for (std::int64_t d = 0; d < half; ++d) {
        const typename Num::Element second = r + 1 < count ? first[half + d] : 0;
        pair[2 * d] = (first[d] & 0xffffu) | second << 16;
        pair[2 * d + 1] = first[d] >> 16 | (second & 0xffff0000u);
      }
    }
  }
}

// Weights [count, 64] turned into elements [64, kGroupRows / per] of neighbouring rows.
template <class Num>
void turn_weights(float* weights, int count, typename Num::Element* to) {
  if (count % Num::kPer != 0) {
    std::fill_n(weights + count * kPageTokens, kPageTokens, 0.0f);
  }
  for (int r = 0; r < count; r += Num::kPer) {
    for (int t = 0; t < kPageTokens; ++t) {
      to[t * (kGroupRows / Num::kPer) + r / Num::kPer] =
          Num::make(weights + r * kPageTokens + t, kPageTokens);
    }
  }
}

// sum [64, D] += weights^T rows, of up to kGroupRows rows of weights [n, 64] and rows [n, D / per].
// Scratch: `turned` [64, kGroupRows / per], `pairs` [kGroupRows / per, D].
template <class Num>
void add_turned(float* weights, const typename Num::Element* rows, int n, std::int64_t dim,
                typename Num::Element* turned, typename Num::Element* pairs, float* sum) {
  turn_weights<Num>(weights, n, turned);
  pair_rows<Num>(rows, n, dim, pairs);
  constexpr int kKeys = kPageTokens / 2;  // at once: a product takes up to kGroupRows
  static_assert(kKeys <= kGroupRows && kGroupRows % Num::kPer == 0);
  Product<Num> product;
  for (int first = 0; first < kPageTokens; first += kKeys) {
    for (int i = 0; i < kKeys; ++i) {
      product.a[i] = turned + (first + i) * (kGroupRows / Num::kPer);
      product.c[i] = sum + (first + i) * dim;
    }
    product.template run<true>(kKeys, pairs, dim, dim, (n + Num::kPer - 1) / Num::kPer);
  }
}

INFLLM_CPU_END
