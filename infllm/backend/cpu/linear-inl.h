// SPDX-License-Identifier: Apache-2.0
//
// linear: y = alpha x W^T over the panels of linear_pack.h. One loop nest serves prefill and
// decode:
//
//   for a block of 512 inputs           acc: registers, from zero
//     for a panel of 64 outputs         its slice of weights stays in the caches
//       for a tile of 6 tokens          total += acc
//
// An output is summed in the same order whatever else runs with it: a token's result is bitwise the
// same alone, in a batch, and with any number of threads.
//
// Activations are packed once a call: tiles of tokens, blocks of inputs, rounded to bf16 pairs
// where the machine multiplies those natively. Int8 codes are exact in bf16, so they are multiplied
// as bf16 weights are, widened in registers for few tokens and to scratch for more; the scale of a
// group multiplies its sum.
#pragma once

#include <algorithm>
#include <type_traits>

#include "infllm/backend/cpu/linear_pack.h"
#include "infllm/backend/cpu/linear_tile-inl.h"
#include "infllm/backend/cpu/linear_tuning.h"
#include "infllm/core/arena.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

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
  // At least 1: a step may have no tokens, and its workspace is asked for all the same.
  plan.task_tokens = std::clamp<std::int64_t>(params.tokens, 1, kTaskTokens);
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

// Packs the activations of a tile: [blocks][tokens of the tile][512 inputs], zeros at the end.
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
        std::uint32_t* widened = scratch.widened + worker * kWidenedLanes;
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
