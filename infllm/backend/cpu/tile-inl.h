// SPDX-License-Identifier: Apache-2.0
//
// The two products of attention, logits = q K^T and o += P V, are one: C[r, n] = sum_k A[r, k] B[k,
// n] with B a tile of the cache, whose rows are vectors, and A rows of elements that are broadcast.
// An element is a pair of bf16 values or a float; see page.h.
//
// kMicroRows x kMicroVectors accumulators stay in registers over k: with 32 registers 6 x 4, so a
// step of k is 24 dot products on 4 + 6 loads, which the load ports hide.
#pragma once

#include <bit>

#include "infllm/backend/cpu/dot-inl.h"
#include "infllm/backend/cpu/tiles.h"
#include "infllm/core/dtype.h"

INFLLM_CPU_BEGIN

#if HWY_TARGET == HWY_AVX2  // 16 registers: 4 x 2 accumulators, 4 halves of B, 2 of A
inline constexpr int kMicroRows = 4;
inline constexpr int kMicroVectors = 2;
#elif HWY_TARGET == HWY_EMU128  // plain loops over 4 floats
inline constexpr int kMicroRows = 2;
inline constexpr int kMicroVectors = 1;
#else                           // 32 registers
inline constexpr int kMicroRows = 6;
inline constexpr int kMicroVectors = 4;
#endif

inline constexpr int kLanes = static_cast<int>(HWY_LANES(float));

// What a step of a product may fetch of the next tile: two cache lines, into L2, because L1 is full
// of the current tile. Fetching two lines a step is what lets eight rows of head dimension 64 cover
// a whole tile.
inline constexpr std::int64_t kAheadBytes = 128;
inline constexpr int kIntoL2 = 2;  // of __builtin_prefetch

// Cached values of type bf16: pairs.
struct Pairs {
  using Element = std::uint32_t;
  static constexpr int kPer = 2;  // values in an element
  using Vector = VU32;
  static HWY_INLINE Vector load(const Element* from) { return hn::LoadU(U32(), from); }
  static HWY_INLINE Vector broadcast(Element x) { return hn::Set(U32(), x); }
  static HWY_INLINE VF32 multiply_add(Vector a, Vector b, VF32 acc) { return dot_pairs(a, b, acc); }
  static Element make(const float* values, std::int64_t stride) {
    return BF16(values[0]).bits | static_cast<std::uint32_t>(BF16(values[stride]).bits) << 16;
  }
  static float get(Element e, int i) {
    return std::bit_cast<float>(i == 0 ? e << 16 : e & 0xffff0000u);
  }
  static void set(Element* e, int i, float value) {
    const std::uint32_t bits = BF16(value).bits;
    *e = i == 0 ? (*e & 0xffff0000u) | bits : (*e & 0xffffu) | bits << 16;
  }
};

// Cached values of type f32: exact, for models run in float.
struct Floats {
  using Element = float;
  static constexpr int kPer = 1;
  using Vector = VF32;
  static HWY_INLINE Vector load(const Element* from) { return hn::LoadU(F32(), from); }
  static HWY_INLINE Vector broadcast(Element x) { return hn::Set(F32(), x); }
  static HWY_INLINE VF32 multiply_add(Vector a, Vector b, VF32 acc) {
    return hn::MulAdd(a, b, acc);
  }
  static Element make(const float* values, std::int64_t) { return *values; }
  static float get(Element e, int) { return e; }
  static void set(Element* e, int, float value) { *e = value; }
};

// Calls body.template operator()<Pairs or Floats>().
template <typename Body>
Status with_element(DType dtype, Body&& body) {
  return dtype == DType::kBF16 ? body.template operator()<Pairs>()
                               : body.template operator()<Floats>();
}

// Stores 2 * kLanes floats as elements in their order.
HWY_INLINE void store_elements(VF32 low, VF32 high, float* to) {
  hn::StoreU(low, F32(), to);
  hn::StoreU(high, F32(), to + kLanes);
}
HWY_INLINE void store_elements(VF32 low, VF32 high, std::uint32_t* to) {
#if defined(INFLLM_CPU_NATIVE_BF16)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.raw, low.raw));
#else
  // Round to nearest even in integers; lanes are finite.
  const hn::RebindToSigned<F32> di;
  const hn::Rebind<std::uint16_t, F32> dh;
  const U32 du;
  const auto round = [&](VF32 x) HWY_ATTR {
    const VU32 bits = hn::BitCast(du, x);
    const VU32 tie = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const VU32 up = hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), tie);
    return hn::DemoteTo(dh, hn::BitCast(di, hn::ShiftRight<16>(up)));
  };
  auto* halves = reinterpret_cast<std::uint16_t*>(to);
  hn::StoreU(round(low), dh, halves);
  hn::StoreU(round(high), dh, halves + kLanes);
#endif
}

// `count` floats to elements; the query rows of a tile.
template <typename Num>
HWY_INLINE void to_elements(const float* from, std::int64_t count, typename Num::Element* to) {
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    store_elements(hn::LoadU(F32(), from + i), hn::LoadU(F32(), from + i + kLanes),
                   to + i / Num::kPer);
  }
  for (; i < count; i += Num::kPer) to[i / Num::kPer] = Num::make(from + i, 1);
}

// C = A B, or C += A B, for kRows rows and kVectors vectors of columns. With kAhead, every step
// also fetches two cache lines from `ahead` on.
template <class Num, int kRows, int kVectors, bool kAdd, bool kAhead>
HWY_INLINE void micro_product(const typename Num::Element* const* a, const typename Num::Element* b,
                              std::int64_t stride, std::int64_t steps, float* const* c,
                              std::int64_t column, const std::byte* ahead) {
  const F32 d;
  VF32 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = kAdd ? hn::LoadU(d, c[r] + column + v * kLanes) : hn::Zero(d);
    }
  }
  const typename Num::Element* row = b + column;
  for (std::int64_t k = 0; k < steps; ++k, row += stride) {
    if constexpr (kAhead) {
      __builtin_prefetch(ahead + k * kAheadBytes, 0, kIntoL2);
      __builtin_prefetch(ahead + k * kAheadBytes + kAheadBytes / 2, 0, kIntoL2);
    }
    typename Num::Vector tile[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) tile[v] = Num::load(row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Num::Vector x = Num::broadcast(a[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Num::multiply_add(x, tile[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[r][v], d, c[r] + column + v * kLanes);
  }
}

template <class Num, int kVectors, bool kAdd, bool kAhead, int kRows = kMicroRows>
void micro_rows(int rows, const typename Num::Element* const* a, const typename Num::Element* b,
                std::int64_t stride, std::int64_t steps, float* const* c, std::int64_t column,
                const std::byte* ahead) {
  if (rows == kRows) {
    micro_product<Num, kRows, kVectors, kAdd, kAhead>(a, b, stride, steps, c, column, ahead);
  } else if constexpr (kRows > 1) {
    micro_rows<Num, kVectors, kAdd, kAhead, kRows - 1>(rows, a, b, stride, steps, c, column, ahead);
  }
}

// Memory that will be needed soon.
struct Upcoming {
  const std::byte* from = nullptr;
  const std::byte* end = nullptr;
};

// One product of a group of rows. A row's arithmetic does not depend on the other rows of its
// group, so tiles and groups may be cut in any way without changing a bit of the result.
template <class Num>
struct Product {
  using Element = typename Num::Element;
  const Element* a[kGroupRows];
  float* c[kGroupRows];

  // B is [steps][stride], of which `columns` (a multiple of 16) are used. Fetches `ahead` on the
  // way, as far as the steps go round.
  template <bool kAdd>
  void run(int rows, const Element* b, std::int64_t stride, std::int64_t columns,
           std::int64_t steps, Upcoming ahead = {}) const {
    // As even as possible: 16 rows are 6 + 5 + 5.
    const int pieces = (rows + kMicroRows - 1) / kMicroRows;
    for (std::int64_t column = 0; column < columns;) {
      const bool wide = columns - column >= kMicroVectors * kLanes;
      for (int piece = 0; piece < pieces; ++piece) {
        const int first = rows * piece / pieces;
        const int count = rows * (piece + 1) / pieces - first;
        if (!wide) {
          micro_rows<Num, 1, kAdd, false>(count, a + first, b, stride, steps, c + first, column,
                                          nullptr);
        } else if (ahead.end - ahead.from >= steps * kAheadBytes) {
          micro_rows<Num, kMicroVectors, kAdd, true>(count, a + first, b, stride, steps, c + first,
                                                     column, ahead.from);
          ahead.from += steps * kAheadBytes;
        } else {
          micro_rows<Num, kMicroVectors, kAdd, false>(count, a + first, b, stride, steps, c + first,
                                                      column, nullptr);
        }
      }
      column += (wide ? kMicroVectors : 1) * kLanes;
    }
  }
};

INFLLM_CPU_END
