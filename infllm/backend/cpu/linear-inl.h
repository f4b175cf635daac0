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

#include <hwy/cache_control.h>

#include <algorithm>

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

// How a tile multiplies: kStep inputs at a time from one row of 64 lanes.
struct FloatWeights {
  using Lane = float;
  using Activation = float;
  static constexpr int kStep = 1;

  struct Loaded {
    VF32 w;
  };
  static HWY_INLINE Loaded load(const Lane* w) { return {hn::Load(F32(), w)}; }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return hn::MulAdd(hn::Set(F32(), *x), w.w, acc);
  }
};

struct PairWeights {
  using Lane = std::uint32_t;
  static constexpr int kStep = 2;
#if defined(INFLLM_CPU_NATIVE_BF16)
  using Activation = std::uint32_t;  // a pair
  struct Loaded {
    VU32 w;
  };
  static HWY_INLINE Loaded load(const Lane* w) { return {hn::Load(U32(), w)}; }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return dot_pairs(hn::Set(U32(), *x), w.w, acc);
  }
#else
  using Activation = float;
  struct Loaded {
    VF32 even, odd;
  };
  static HWY_INLINE Loaded load(const Lane* w) {
    const VU32 pairs = hn::Load(U32(), w);
    return {even_of(pairs), odd_of(pairs)};
  }
  static HWY_INLINE VF32 multiply(const Activation* x, Loaded w, VF32 acc) {
    return hn::MulAdd(hn::Set(F32(), x[1]), w.odd, hn::MulAdd(hn::Set(F32(), x[0]), w.even, acc));
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
                                const typename Weights::Lane* HWY_RESTRICT w, std::int64_t steps,
                                const float* HWY_RESTRICT scale, bool first,
                                float* HWY_RESTRICT total) {
  const F32 d;
  for (std::int64_t column = 0; column < kPanelOutputs; column += kTileOutputs) {
    VF32 acc[kTokens][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = hn::Zero(d);
    }
    const auto* lanes = w + column;
    const auto* activation = x;
    for (std::int64_t step = 0; step < steps; ++step) {
      if constexpr (kTokens <= 2) hwy::Prefetch(lanes + 16 * kPanelOutputs);
      typename Weights::Loaded loaded[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) loaded[v] = Weights::load(lanes + v * kFloatLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
          acc[m][v] =
              Weights::multiply(activation + m * kRowActivations<Weights>, loaded[v], acc[m][v]);
        }
      }
      lanes += kPanelOutputs;
      activation += kPerStep<Weights>;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        float* to = total + m * kPanelOutputs + column + v * kFloatLanes;
        const VF32 before = first ? hn::Zero(d) : hn::Load(d, to);
        const VF32 sum = acc[m][v];
        hn::Store(scale == nullptr
                      ? hn::Add(before, sum)
                      : hn::MulAdd(sum, hn::Load(d, scale + column + v * kFloatLanes), before),
                  d, to);
      }
    }
  }
}

template <typename Weights>
void multiply_tile(int tokens, const typename Weights::Activation* x,
                   const typename Weights::Lane* w, std::int64_t steps, const float* scale,
                   bool first, float* total) {
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

// Widens `inputs` (a multiple of 4) int8 codes of a panel slice.
#if defined(INFLLM_CPU_NATIVE_BF16)
using CodeWeights = PairWeights;
#else
using CodeWeights = FloatWeights;
#endif

inline void widen_codes(const std::int8_t* HWY_RESTRICT codes, std::int64_t inputs,
                        CodeWeights::Lane* HWY_RESTRICT out) {
  const hn::RebindToSigned<F32> di;
  const F32 df;
  constexpr std::int64_t kRow = kPanelOutputs;
  for (std::int64_t k = 0; k < inputs; k += kInputQuad) {
    for (std::int64_t lane = 0; lane < kRow;
         lane += kFloatLanes, codes += kFloatLanes * kInputQuad) {
      const auto quad = hn::Load(di, reinterpret_cast<const std::int32_t*>(codes));
      const auto code = [&](auto shifted)
                            HWY_ATTR { return hn::ConvertTo(df, hn::ShiftRight<24>(shifted)); };
      const VF32 w0 = code(hn::ShiftLeft<24>(quad));  // bytes hold inputs 0, 2, 1, 3
      const VF32 w2 = code(hn::ShiftLeft<16>(quad));
      const VF32 w1 = code(hn::ShiftLeft<8>(quad));
      const VF32 w3 = code(quad);
#if defined(INFLLM_CPU_NATIVE_BF16)
      const U32 du;
      const auto pair = [&](VF32 even, VF32 odd) HWY_ATTR {
        return hn::Or(hn::ShiftRight<16>(hn::BitCast(du, even)), hn::BitCast(du, odd));
      };
      hn::Store(pair(w0, w1), du, out + lane);
      hn::Store(pair(w2, w3), du, out + kRow + lane);
#else
      hn::Store(w0, df, out + lane);
      hn::Store(w1, df, out + kRow + lane);
      hn::Store(w2, df, out + 2 * kRow + lane);
      hn::Store(w3, df, out + 3 * kRow + lane);
#endif
    }
    out += kInputQuad / CodeWeights::kStep * kRow;
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
  typename Weights::Lane* widened;
};

inline constexpr std::int64_t kWidenedLanes = kBlockInputs / CodeWeights::kStep * kPanelOutputs;

template <typename Weights, typename Taker>
LinearScratch<Weights> take_scratch(const Backend& backend, const LinearParams& params,
                                    const LinearPlan& plan, Taker&& take) {
  const std::int64_t workers = backend.pool->size();
  LinearScratch<Weights> scratch{};
  scratch.x =
      take(typename Weights::Activation(), params.tokens * plan.blocks * kRowActivations<Weights>);
  scratch.totals = take(float(), workers * plan.task_panels * plan.task_tokens * kPanelOutputs);
  if (params.weight->format == WeightFormat::kI8) {
    scratch.widened = take(typename Weights::Lane(), workers * kWidenedLanes);
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

// One task: plan.task_tokens tokens by plan.task_panels panels.
template <typename Weights>
void linear_task(const LinearParams& params, const LinearPlan& plan,
                 const LinearScratch<Weights>& scratch, std::int64_t task, int worker) {
  const LinearWeight& weight = *params.weight;
  const PanelLayout& layout = plan.layout;
  const std::int64_t first_token = task % plan.token_tasks * plan.task_tokens;
  const std::int64_t tokens = std::min(plan.task_tokens, params.tokens - first_token);
  const std::int64_t first_panel = task / plan.token_tasks * plan.task_panels;
  const std::int64_t panels = std::min(plan.task_panels, layout.panels - first_panel);
  const std::int64_t x_row = plan.blocks * kRowActivations<Weights>;  // of one token
  float* totals = scratch.totals + worker * plan.task_panels * plan.task_tokens * kPanelOutputs;
  const bool is_int8 = weight.format == WeightFormat::kI8;

  for (std::int64_t first = 0; first < layout.inputs;) {
    // A slice ends with its block, and with its group of int8 weights.
    const std::int64_t block = first / kBlockInputs;
    const std::int64_t in_block = first % kBlockInputs;
    std::int64_t last = std::min((block + 1) * kBlockInputs, layout.inputs);
    if (is_int8) {
      last = std::min(last, (first / layout.group_inputs + 1) * layout.group_inputs);
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::byte* panel = weight.storage.data() + (first_panel + p) * layout.panel_bytes;
      const typename Weights::Lane* slice;
      const float* scale = nullptr;
      if (is_int8) {
        auto* widened = scratch.widened + worker * kWidenedLanes;
        widen_codes(reinterpret_cast<const std::int8_t*>(panel) + first * kPanelOutputs,
                    last - first, reinterpret_cast<CodeWeights::Lane*>(widened));
        slice = widened;
        scale = reinterpret_cast<const float*>(panel + layout.weight_bytes) +
                first / layout.group_inputs * kPanelOutputs;
      } else {
        slice = reinterpret_cast<const typename Weights::Lane*>(panel) +
                first / Weights::kStep * kPanelOutputs;
      }
      for (std::int64_t t = 0; t < tokens; t += kTileTokens) {
        const auto m = static_cast<int>(std::min<std::int64_t>(kTileTokens, tokens - t));
        multiply_tile<Weights>(m,
                               scratch.x + (first_token + t) * x_row +
                                   block * m * kRowActivations<Weights> +
                                   in_block / Weights::kStep * kPerStep<Weights>,
                               slice, (last - first) / Weights::kStep, scale, first == 0,
                               totals + (p * plan.task_tokens + t) * kPanelOutputs);
      }
    }
    first = last;
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
