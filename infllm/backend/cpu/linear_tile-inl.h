// SPDX-License-Identifier: Apache-2.0
//
// The register tile of linear: up to 6 tokens by one slice of a panel (linear_pack.h), generic over
// how the weights are kept.
//
//   FloatWeights   f32 times f32
//   PairWeights    bf16 pairs: times bf16 pairs where the machine has dot_pairs in one instruction,
//                  otherwise widened and times f32
//   CodeWeights    int8 codes: bf16 holds them exactly, so they become pairs in registers
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "infllm/backend/cpu/dot-inl.h"
#include "infllm/backend/cpu/linear_pack.h"
#include "infllm/backend/cpu/linear_tuning.h"

INFLLM_CPU_BEGIN

inline constexpr int kFloatLanes = HWY_LANES(float);
inline constexpr int kPanelVectors = kPanelOutputs / kFloatLanes;
// Accumulators held at once: 24 of 32 registers, 12 of 16.
inline constexpr int kAccumulators = HWY_TARGET == HWY_AVX2 ? 12 : 24;

// Vectors of outputs that a tile of `tokens` sums in one pass: all of the panel where they fit.
constexpr int tile_vectors(int tokens) {
  int vectors = kPanelVectors;
  while (vectors * tokens > kAccumulators) vectors /= 2;
  return vectors;
}

// How a tile multiplies: a step is kStep inputs of 64 outputs, kStepBytes of memory.
struct FloatWeights {
  using Activation = float;
  static constexpr int kStep = 1;
  static constexpr std::int64_t kStepBytes = kPanelOutputs * 4;
  using Loaded = VF32;

  // The output that vector v of the panel begins with.
  static constexpr std::int64_t column(int v) { return v * kFloatLanes; }
  // Vectors v and v + 1, v even.
  static HWY_INLINE void load_two(const std::byte* step, int v, Loaded* w) {
    const auto* row = reinterpret_cast<const float*>(step);
    w[0] = hn::Load(F32(), row + column(v));
    w[1] = hn::Load(F32(), row + column(v + 1));
  }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return hn::MulAdd(hn::Set(F32(), *x), w, acc);
  }
};

struct PairWeights {
  static constexpr int kStep = 2;
  static constexpr std::int64_t kStepBytes = kPanelOutputs * 4;
#if defined(INFLLM_CPU_NATIVE_BF16)
  using Activation = std::uint32_t;  // a pair
  using Loaded = VU32;
  static HWY_INLINE Loaded loaded(VU32 pairs) { return pairs; }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return dot_pairs(hn::Set(U32(), *x), w, acc);
  }
#else
  using Activation = float;
  struct Loaded {
    VF32 even, odd;
  };
  static HWY_INLINE Loaded loaded(VU32 pairs) { return {even_of(pairs), odd_of(pairs)}; }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return hn::MulAdd(hn::Set(F32(), x[1]), w.odd, hn::MulAdd(hn::Set(F32(), x[0]), w.even, acc));
  }
#endif

  static constexpr std::int64_t column(int v) { return v * kFloatLanes; }
  static HWY_INLINE void load_two(const std::byte* step, int v, Loaded* w) {
    const auto* row = reinterpret_cast<const std::uint32_t*>(step);
    w[0] = loaded(hn::Load(U32(), row + column(v)));
    w[1] = loaded(hn::Load(U32(), row + column(v + 1)));
  }
};

#if defined(INFLLM_CPU_NATIVE_BF16)
// The bytes of 0 .. 127 as bf16.
struct BF16OfCode {
  alignas(64) std::uint8_t low[128];
  alignas(64) std::uint8_t high[128];
};
inline constexpr BF16OfCode kBF16OfCode = [] {
  BF16OfCode table{};
  for (int code = 0; code < 128; ++code) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(static_cast<float>(code)) >> 16;
    table.low[code] = static_cast<std::uint8_t>(bits & 0xff);
    table.high[code] = static_cast<std::uint8_t>(bits >> 8);
  }
  return table;
}();
#endif

// Int8 codes, exact as bf16: multiplied as PairWeights would.
struct CodeWeights : PairWeights {
  static constexpr std::int64_t kStepBytes = kPanelOutputs * 2;

  // One vector of bytes is two of outputs, 16 apart (code_place).
  static constexpr std::int64_t column(int v) {
    constexpr int kPerHalf = 16 / kFloatLanes;
    return v / 2 / kPerHalf * 32 + v / 2 % kPerHalf * kFloatLanes + v % 2 * 16;
  }
  static HWY_INLINE void load_two(const std::byte* step, int v, Loaded* w) {
    unpack(reinterpret_cast<const std::uint32_t*>(step) + v / 2 * kFloatLanes, w[0], w[1]);
  }

#if defined(INFLLM_CPU_NATIVE_BF16)
  static VU32 pairs_of(Loaded w) { return w; }

 private:
  // bf16 of 0 .. 127, low and high bytes apart, by two table look-ups; then the sign.
  static HWY_INLINE void unpack(const std::uint32_t* codes, Loaded& lower, Loaded& upper) {
    const __m512i bytes = hn::Load(U32(), codes).raw;
    const __m512i magnitude = _mm512_abs_epi8(bytes);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16OfCode.low), magnitude,
                                                 _mm512_load_si512(kBF16OfCode.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16OfCode.high), magnitude,
                                                  _mm512_load_si512(kBF16OfCode.high + 64));
    const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(-128));
    lower = VU32{_mm512_unpacklo_epi8(low, _mm512_or_si512(high, sign))};
    upper = VU32{_mm512_unpackhi_epi8(low, _mm512_or_si512(high, sign))};
  }
#else
  static HWY_INLINE VU32 pairs_of(Loaded w) {
    return hn::Or(hn::ShiftRight<16>(hn::BitCast(U32(), w.even)), hn::BitCast(U32(), w.odd));
  }

 private:
  static HWY_INLINE void unpack(const std::uint32_t* codes, Loaded& lower, Loaded& upper) {
    const hn::Repartition<std::uint16_t, U32> d16;
    const auto bytes = hn::BitCast(d16, hn::Load(U32(), codes));
    lower = floats_of(hn::BitCast(U32(), hn::InterleaveLower(d16, bytes, hn::Zero(d16))));
    upper = floats_of(hn::BitCast(U32(), hn::InterleaveUpper(d16, bytes, hn::Zero(d16))));
  }
  // Two codes in the low bytes of each lane.
  static HWY_INLINE Loaded floats_of(VU32 codes) {
    const hn::RebindToSigned<U32> di;
    const auto even = hn::ShiftRight<24>(hn::BitCast(di, hn::ShiftLeft<24>(codes)));
    const auto odd = hn::ShiftRight<24>(hn::BitCast(di, hn::ShiftLeft<16>(codes)));
    return {hn::ConvertTo(F32(), even), hn::ConvertTo(F32(), odd)};
  }
#endif
};

// Activations of one step, and of a block of a token.
template <typename Weights>
inline constexpr int kPerStep =
    std::is_same_v<typename Weights::Activation, float> ? Weights::kStep : 1;
template <typename Weights>
inline constexpr std::int64_t kRowActivations = kBlockInputs / Weights::kStep* kPerStep<Weights>;

// total[m][64] (+)= scale x W over `steps` steps of one panel slice.
template <typename Weights, int kTokens>
HWY_NOINLINE void multiply_tile(const typename Weights::Activation* HWY_RESTRICT x,
                                const std::byte* HWY_RESTRICT w, std::int64_t steps,
                                const float* HWY_RESTRICT scale, bool first,
                                float* HWY_RESTRICT total) {
  constexpr int kVectors = tile_vectors(kTokens);
  constexpr std::int64_t kRow = kRowActivations<Weights>;
  const F32 d;
  for (int v0 = 0; v0 < kPanelVectors; v0 += kVectors) {
    VF32 acc[kTokens][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) acc[m][v] = hn::Zero(d);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      const auto* x_step = x + step * kPerStep<Weights>;
      const std::byte* w_step = w + step * Weights::kStepBytes;
      typename Weights::Loaded loaded[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v += 2) Weights::load_two(w_step, v0 + v, loaded + v);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          acc[m][v] = Weights::multiply(x_step + m * kRow, loaded[v], acc[m][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t column = Weights::column(v0 + v);
        float* to = total + m * kPanelOutputs + column;
        const VF32 before = first ? hn::Zero(d) : hn::Load(d, to);
        const VF32 sum = acc[m][v];
        hn::Store(scale == nullptr ? hn::Add(before, sum)
                                   : hn::MulAdd(sum, hn::Load(d, scale + column), before),
                  d, to);
      }
    }
  }
}

template <typename Weights>
void multiply_tile(int tokens, const typename Weights::Activation* x, const std::byte* w,
                   std::int64_t steps, const float* scale, bool first, float* total) {
  static_assert(kTileTokens == 6);
  switch (tokens) {
    case 1:
      return multiply_tile<Weights, 1>(x, w, steps, scale, first, total);
    case 2:
      return multiply_tile<Weights, 2>(x, w, steps, scale, first, total);
    case 3:
      return multiply_tile<Weights, 3>(x, w, steps, scale, first, total);
    case 4:
      return multiply_tile<Weights, 4>(x, w, steps, scale, first, total);
    case 5:
      return multiply_tile<Weights, 5>(x, w, steps, scale, first, total);
    default:
      return multiply_tile<Weights, 6>(x, w, steps, scale, first, total);
  }
}

// A panel slice of codes as PairWeights, for more tokens than one tile.
inline void widen_slice(const std::byte* codes, std::int64_t inputs, std::uint32_t* out) {
  for (std::int64_t step = 0; step < inputs / 2; ++step) {
    for (int v = 0; v < kPanelVectors; v += 2) {
      CodeWeights::Loaded two[2];
      CodeWeights::load_two(codes, v, two);
      hn::Store(CodeWeights::pairs_of(two[0]), U32(), out + CodeWeights::column(v));
      hn::Store(CodeWeights::pairs_of(two[1]), U32(), out + CodeWeights::column(v + 1));
    }
    codes += CodeWeights::kStepBytes;
    out += kPanelOutputs;
  }
}

INFLLM_CPU_END
