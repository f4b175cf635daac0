// SPDX-License-Identifier: Apache-2.0
//
// linear: y = alpha x W^T over the panels of linear_pack.h. One loop nest serves prefill and
// decode:
//
//   for a block of 256 inputs           acc: registers, from zero
//     for a panel of 64 outputs         its slice of weights stays in the first-level cache
//       for a tile of 6 tokens          total += acc
//
// An output is summed in the same order whatever else runs with it: a token's result is bitwise the
// same alone, in a batch, and with any number of threads.
//
// Activations are packed once a call: tiles of tokens, blocks of inputs, rounded to bf16 pairs
// where the machine multiplies those natively. Codes of int8 weights are exact in bf16, so a slice
// of them is widened to scratch and multiplied as bf16 (or float) weights are; the scale of a group
// multiplies its sum.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "infllm/backend/cpu/dot-inl.h"
#include "infllm/backend/cpu/linear_pack.h"
#include "infllm/backend/cpu/linear_tuning.h"
#include "infllm/core/arena.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

inline constexpr int kFloatLanes = HWY_LANES(float);
// 6 x 4 accumulators where there are 32 registers, 6 x 2 where there are 16.
inline constexpr int kTileVectors = HWY_TARGET == HWY_AVX2 ? 2 : 4;
inline constexpr int kTileOutputs = kTileVectors * kFloatLanes;
static_assert(kPanelOutputs % kTileOutputs == 0);

// How a tile multiplies: a step is kStep inputs of 64 outputs, kStepBytes of memory.
struct FloatWeights {
  using Activation = float;
  static constexpr int kStep = 1;
  static constexpr std::int64_t kStepBytes = kPanelOutputs * 4;
  using Loaded = VF32;

  // The output that vector v of a pass begins with.
  static constexpr std::int64_t column(int pass, int v) {
    return (pass * kTileVectors + v) * kFloatLanes;
  }
  static HWY_INLINE void load(const std::byte* step, int pass, Loaded* w) {
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] = hn::Load(F32(), reinterpret_cast<const float*>(step) + column(pass, v));
    }
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

  static constexpr std::int64_t column(int pass, int v) { return FloatWeights::column(pass, v); }
  static HWY_INLINE void load(const std::byte* step, int pass, Loaded* w) {
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] =
          loaded(hn::Load(U32(), reinterpret_cast<const std::uint32_t*>(step) + column(pass, v)));
    }
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
  static constexpr std::int64_t column(int pass, int v) {
    constexpr int kPerHalf = 16 / kFloatLanes;
    const int pair = (pass * kTileVectors + v) / 2;
    return pair / kPerHalf * 32 + pair % kPerHalf * kFloatLanes + v % 2 * 16;
  }
  static HWY_INLINE void load(const std::byte* step, int pass, Loaded* w) {
    for (int v = 0; v < kTileVectors; v += 2) {
      const int pair = (pass * kTileVectors + v) / 2;
      VU32 lower, upper;
      widen(reinterpret_cast<const std::uint32_t*>(step) + pair * kFloatLanes, lower, upper);
      w[v] = loaded(lower);
      w[v + 1] = loaded(upper);
    }
  }
  // A vector of codes as two vectors of bf16 pairs.
  static HWY_INLINE void widen(const std::uint32_t* codes, VU32& lower, VU32& upper) {
    const U32 d;
    const VU32 bytes = hn::Load(d, codes);
#if defined(INFLLM_CPU_NATIVE_BF16)
    // bf16 of 0 .. 127, low and high bytes apart, by two table look-ups; then the sign.
    const __m512i magnitude = _mm512_abs_epi8(bytes.raw);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16OfCode.low), magnitude,
                                                 _mm512_load_si512(kBF16OfCode.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16OfCode.high), magnitude,
                                                  _mm512_load_si512(kBF16OfCode.high + 64));
    const __m512i sign = _mm512_and_si512(bytes.raw, _mm512_set1_epi8(-128));
    const __m512i signed_high = _mm512_or_si512(high, sign);
    lower = VU32{_mm512_unpacklo_epi8(low, signed_high)};
    upper = VU32{_mm512_unpackhi_epi8(low, signed_high)};
#else
    const hn::Repartition<std::uint16_t, U32> d16;
    const auto zero = hn::Zero(d16);
    lower = pairs_of(hn::BitCast(d, hn::InterleaveLower(d16, hn::BitCast(d16, bytes), zero)));
    upper = pairs_of(hn::BitCast(d, hn::InterleaveUpper(d16, hn::BitCast(d16, bytes), zero)));
#endif
  }

 private:
#if !defined(INFLLM_CPU_NATIVE_BF16)
  // Two codes in the low bytes of each lane.
  static HWY_INLINE VU32 pairs_of(VU32 codes) {
    const hn::RebindToSigned<U32> di;
    const auto even = hn::ShiftRight<24>(hn::BitCast(di, hn::ShiftLeft<24>(codes)));
    const auto odd = hn::ShiftRight<24>(hn::BitCast(di, hn::ShiftLeft<16>(codes)));
    return hn::Or(hn::ShiftRight<16>(hn::BitCast(U32(), hn::ConvertTo(F32(), even))),
                  hn::BitCast(U32(), hn::ConvertTo(F32(), odd)));
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
  const F32 d;
  for (int pass = 0; pass < kPanelOutputs / kTileOutputs; ++pass) {
    VF32 acc[kTokens][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = hn::Zero(d);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      typename Weights::Loaded loaded[kTileVectors];
      Weights::load(w + step * Weights::kStepBytes, pass, loaded);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
          acc[m][v] = Weights::multiply(x + m * kRowActivations<Weights> + step * kPerStep<Weights>,
                                        loaded[v], acc[m][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        const std::int64_t column = Weights::column(pass, v);
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
    const auto* from =
        reinterpret_cast<const std::uint32_t*>(codes + step * CodeWeights::kStepBytes);
    for (int pass = 0; pass < kPanelOutputs / kTileOutputs; ++pass) {
      for (int v = 0; v < kTileVectors; v += 2) {
        const int pair = (pass * kTileVectors + v) / 2;
        VU32 lower, upper;
        CodeWeights::widen(from + pair * kFloatLanes, lower, upper);
        hn::Store(lower, U32(), out + CodeWeights::column(pass, v));
        hn::Store(upper, U32(), out + CodeWeights::column(pass, v + 1));
      }
    }
    out += kPanelOutputs;
  }
}

// How one call is cut. Shapes alone decide.
struct LinearPlan {
  PanelLayout layout;
  std::int64_t blocks = 0;  // of inputs
  std::int64_t task_tokens = 0;
  std::int64_t task_panels = 0;
  std::int64_t token_tasks = 0;
  std::int64_t panel_tasks = 0;
};

inline LinearPlan plan_linear(const LinearParams& params) {
  LinearPlan plan;
  plan.layout = panel_layout(*params.weight);
  plan.blocks = (plan.layout.inputs + kBlockInputs - 1) / kBlockInputs;
  plan.task_tokens = std::min(kTaskTokens, params.tokens);
  plan.task_panels = params.tokens <= 2 * kTileTokens ? 1 : kTaskPanels;
  plan.token_tasks = (params.tokens + plan.task_tokens - 1) / plan.task_tokens;
  plan.panel_tasks = (plan.layout.panels + plan.task_panels - 1) / plan.task_panels;
  return plan;
}

// Scratch of one call: packed activations, then per worker totals and widened codes.
template <typename Weights>
struct LinearScratch {
  typename Weights::Activation* x;
  float* totals;
  std::uint32_t* widened;  // of int8
};

inline constexpr std::int64_t kWidenedLanes = kBlockInputs / 2 * kPanelOutputs;

template <typename Weights, typename Taker>
LinearScratch<Weights> take_scratch(const Backend& backend, const LinearParams& params,
                                    const LinearPlan& plan, Taker&& take) {
  const std::int64_t workers = backend.pool->size();
  LinearScratch<Weights> scratch{};
  scratch.x =
      take(typename Weights::Activation(), params.tokens * plan.blocks * kRowActivations<Weights>);
  scratch.totals = take(float(), workers * plan.task_panels * plan.task_tokens * kPanelOutputs);
  if (params.weight->format == WeightFormat::kI8) {
    scratch.widened = take(std::uint32_t(), workers * kWidenedLanes);
  }
  return scratch;
}

// Packs the activations of a tile: [blocks][tokens of the tile][256 inputs], zeros at the end.
template <typename Weights>
void pack_activations(const float* HWY_RESTRICT x, int tokens, std::int64_t inputs,
                      const LinearPlan& plan, typename Weights::Activation* HWY_RESTRICT out) {
  const F32 d;
  for (std::int64_t block = 0; block < plan.blocks; ++block) {
    const std::int64_t first = block * kBlockInputs;
    const std::int64_t count = std::min(kBlockInputs, inputs - first);
    const std::int64_t padded = std::min(kBlockInputs, plan.layout.inputs - first);
    for (int m = 0; m < tokens; ++m, out += kRowActivations<Weights>) {
      const float* from = x + m * inputs + first;
      std::int64_t k = 0;
      if constexpr (std::is_same_v<typename Weights::Activation, float>) {
        for (; k + kFloatLanes <= count; k += kFloatLanes)
          hn::StoreU(hn::LoadU(d, from + k), d, out + k);
        for (; k < count; ++k) out[k] = from[k];
        for (; k < padded; ++k) out[k] = 0;
      } else {
#if defined(INFLLM_CPU_NATIVE_BF16)
        auto* pairs = reinterpret_cast<std::uint16_t*>(out);
        for (; k + kFloatLanes <= count; k += kFloatLanes) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + k),
                              (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k)));
        }
        for (; k < count; ++k) pairs[k] = BF16(from[k]).bits;
        for (; k < padded; ++k) pairs[k] = 0;
#endif
      }
    }
  }
}

// y = alpha total (+ y) for the tokens of a task and one panel. Multiply-add is spelled out: where
// the compiler contracts on its own is not the same for each token.
inline void store_totals(const float* HWY_RESTRICT total, std::int64_t tokens, std::int64_t columns,
                         const LinearParams& params, float* HWY_RESTRICT y) {
  const F32 d;
  const VF32 alpha = hn::Set(d, params.alpha);
  HWY_ALIGN float edge[kFloatLanes] = {};
  for (std::int64_t m = 0; m < tokens; ++m, total += kPanelOutputs, y += params.weight->outputs) {
    for (std::int64_t n = 0; n < columns; n += kFloatLanes) {
      const VF32 sum = hn::Load(d, total + n);
      const std::int64_t valid = std::min<std::int64_t>(kFloatLanes, columns - n);
      float* to = valid == kFloatLanes ? y + n : edge;
      if (valid < kFloatLanes && params.accumulate) std::copy_n(y + n, valid, edge);
      const VF32 before = params.accumulate ? hn::LoadU(d, to) : hn::Zero(d);
      hn::StoreU(hn::MulAdd(sum, alpha, before), d, to);
      if (valid < kFloatLanes) std::copy_n(edge, valid, y + n);
    }
  }
}

// Inputs [first, last) that are summed at once: a block, cut at its groups of int8 weights.
inline std::int64_t slice_end(const PanelLayout& layout, std::int64_t first) {
  std::int64_t last = std::min((first / kBlockInputs + 1) * kBlockInputs, layout.inputs);
  if (layout.groups > 0) {
    last = std::min(last, (first / layout.group_inputs + 1) * layout.group_inputs);
  }
  return last;
}

// One task: plan.task_tokens tokens by plan.task_panels panels.
template <typename Weights>
void linear_task(const LinearParams& params, const LinearPlan& plan,
                 const LinearScratch<Weights>& scratch, std::int64_t task, int worker) {
  constexpr bool kIsInt8 = std::is_same_v<Weights, CodeWeights>;
  using Widened = std::conditional_t<kIsInt8, PairWeights, Weights>;
  const LinearWeight& weight = *params.weight;
  const PanelLayout& layout = plan.layout;
  const std::int64_t first_token = task % plan.token_tasks * plan.task_tokens;
  const std::int64_t tokens = std::min(plan.task_tokens, params.tokens - first_token);
  const std::int64_t first_panel = task / plan.token_tasks * plan.task_panels;
  const std::int64_t panels = std::min(plan.task_panels, layout.panels - first_panel);
  const std::int64_t x_row = plan.blocks * kRowActivations<Weights>;  // of one token
  const std::byte* panel_0 = weight.storage.data() + first_panel * layout.panel_bytes;
  const auto* x = scratch.x + first_token * x_row;
  auto* widened = scratch.widened + worker * kWidenedLanes;
  float* totals = scratch.totals + worker * plan.task_panels * plan.task_tokens * kPanelOutputs;

  for (std::int64_t first = 0, last; first < layout.inputs; first = last) {
    last = slice_end(layout, first);
    const std::int64_t steps = (last - first + Weights::kStep - 1) / Weights::kStep;
    const std::int64_t x_block = first / kBlockInputs * kRowActivations<Weights>;
    const std::int64_t x_in_block = first % kBlockInputs / Weights::kStep * kPerStep<Weights>;
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::byte* panel = panel_0 + p * layout.panel_bytes;
      const std::byte* slice = panel + first / Weights::kStep * Weights::kStepBytes;
      const float* scale = nullptr;
      float* total = totals + p * plan.task_tokens * kPanelOutputs;
      if constexpr (kIsInt8) {
        scale = reinterpret_cast<const float*>(panel + layout.weight_bytes) +
                first / layout.group_inputs * kPanelOutputs;
        if (tokens <= kFusedTokens) {
          multiply_tile<CodeWeights>(static_cast<int>(tokens), x + x_block * tokens + x_in_block,
                                     slice, steps, scale, first == 0, total);
          continue;
        }
        widen_slice(slice, last - first, widened);
        slice = reinterpret_cast<const std::byte*>(widened);
      }
      for (std::int64_t t = 0; t < tokens; t += kTileTokens) {
        const auto m = static_cast<int>(std::min<std::int64_t>(kTileTokens, tokens - t));
        const auto* x_tile = x + t * x_row + x_block * m + x_in_block;
        multiply_tile<Widened>(m, x_tile, slice, steps, scale, first == 0,
                               total + t * kPanelOutputs);
      }
    }
  }

  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t output = (first_panel + p) * kPanelOutputs;
    store_totals(totals + p * plan.task_tokens * kPanelOutputs, tokens,
                 std::min(kPanelOutputs, weight.outputs - output), params,
                 static_cast<float*>(params.y) + first_token * weight.outputs + output);
  }
}

template <typename Weights>
Status linear_as(const Backend& backend, const LinearParams& params,
                 std::span<std::byte> workspace) {
  const LinearPlan plan = plan_linear(params);
  Arena arena(workspace);
  const auto scratch = take_scratch<Weights>(
      backend, params, plan,
      [&](auto zero, std::int64_t count) { return arena.take<decltype(zero)>(count); });
  const auto* x = static_cast<const float*>(params.x);
  const std::int64_t tiles = (params.tokens + kTileTokens - 1) / kTileTokens;
  backend.pool->parallel_for(tiles, [&](std::int64_t tile, int) {
    const std::int64_t token = tile * kTileTokens;
    const std::int64_t tokens = std::min<std::int64_t>(kTileTokens, params.tokens - token);
    pack_activations<Weights>(x + token * params.weight->inputs, static_cast<int>(tokens),
                              params.weight->inputs, plan,
                              scratch.x + token * plan.blocks * kRowActivations<Weights>);
  });
  backend.pool->parallel_for(plan.token_tasks * plan.panel_tasks,
                             [&](std::int64_t task, int worker) {
                               linear_task<Weights>(params, plan, scratch, task, worker);
                             });
  return {};
}

inline Status run_linear(const Backend& backend, const LinearParams& params,
                         std::span<std::byte> workspace) {
  switch (params.weight->format) {
    case WeightFormat::kBF16:
      return linear_as<PairWeights>(backend, params, workspace);
    case WeightFormat::kI8:
      return linear_as<CodeWeights>(backend, params, workspace);
    default:
      return linear_as<FloatWeights>(backend, params, workspace);
  }
}

inline std::size_t linear_workspace(const Backend& backend, const LinearParams& params) {
  const LinearPlan plan = plan_linear(params);
  const auto bytes_as = [&](auto weights) {
    ArenaSize size;
    take_scratch<decltype(weights)>(backend, params, plan, [&](auto zero, std::int64_t count) {
      size.take<decltype(zero)>(count);
      return static_cast<decltype(zero)*>(nullptr);
    });
    return size.bytes();
  };
  switch (params.weight->format) {
    case WeightFormat::kBF16:
      return bytes_as(PairWeights());
    case WeightFormat::kI8:
      return bytes_as(CodeWeights());
    default:
      return bytes_as(FloatWeights());
  }
}

INFLLM_CPU_END
