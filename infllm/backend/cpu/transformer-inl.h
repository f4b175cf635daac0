// SPDX-License-Identifier: Apache-2.0
//
// rms_norm, rope, swiglu, embed and gather: parallel over tokens, float throughout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "infllm/backend/cpu/dot-inl.h"
#include "infllm/backend/cpu/exp-inl.h"
#include "infllm/core/tensor.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

// Calls body(token) for all tokens; a task is about 16K values, so a decode step stays on its
// thread.
template <typename Body>
void for_tokens(const Backend& backend, std::int64_t tokens, std::int64_t width, Body&& body) {
  constexpr std::int64_t kTaskValues = 16384;
  const std::int64_t per_task =
      std::max<std::int64_t>(1, kTaskValues / std::max<std::int64_t>(1, width));
  const std::int64_t tasks = (tokens + per_task - 1) / per_task;
  backend.pool->parallel_for(tasks, [&](std::int64_t task, int) {
    const std::int64_t last = std::min(tokens, (task + 1) * per_task);
    for (std::int64_t t = task * per_task; t < last; ++t) body(t);
  });
}

// Four chains of lanes: a term of a row of 4096 passes through 64 additions, not 4096.
inline float sum_of_squares(const float* HWY_RESTRICT x, std::int64_t width) {
  const F32 d;
  VF32 sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  std::int64_t i = 0;
  for (; i + 4 * kFloatLanes <= width; i += 4 * kFloatLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const VF32 v = hn::LoadU(d, x + i + c * kFloatLanes);
      sum[c] = hn::MulAdd(v, v, sum[c]);
    }
  }
  float total = 0;
  for (; i < width; ++i) total += x[i] * x[i];
  return total +
         hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
}

inline Status run_rms_norm(const Backend& backend, const RmsNormParams& params,
                           std::span<std::byte>) {
  const auto* weight = static_cast<const float*>(params.weight);
  const std::int64_t width = params.width;
  for_tokens(backend, params.tokens, width, [&](std::int64_t t) {
    const F32 d;
    const float* x = static_cast<const float*>(params.x) + t * width;
    float* y = static_cast<float*>(params.y) + t * width;
    const double mean = static_cast<double>(sum_of_squares(x, width)) / static_cast<double>(width);
    const auto inverse =
        static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(params.epsilon)));
    const VF32 factor = hn::Set(d, inverse);
    std::int64_t i = 0;
    for (; i + kFloatLanes <= width; i += kFloatLanes) {
      const VF32 scaled = hn::Mul(hn::LoadU(d, x + i), factor);
      hn::StoreU(hn::Mul(scaled, hn::LoadU(d, weight + i)), d, y + i);
    }
    for (; i < width; ++i) y[i] = x[i] * inverse * weight[i];
  });
  return {};
}

inline Status run_rope_tables(const Backend& backend, const RopeTableParams& params,
                              std::span<std::byte>) {
  // A cosine and a sine cost about as much as moving a hundred floats.
  for_tokens(backend, params.tokens, 100 * std::int64_t{params.head_dim},
             [&](std::int64_t t) { fill_rope_row(params, t); });
  return {};
}

inline Status run_rope(const Backend& backend, const RopeParams& params, std::span<std::byte>) {
  const std::int64_t half = params.head_dim / 2;
  for_tokens(backend, params.tokens, params.heads * params.head_dim, [&](std::int64_t t) {
    const F32 d;
    const float* cos = params.cos + t * half;
    const float* sin = params.sin + t * half;
    float* x = static_cast<float*>(params.x) + t * params.row_stride;
    for (std::int32_t head = 0; head < params.heads; ++head, x += params.head_dim) {
      std::int64_t i = 0;
      for (; i + kFloatLanes <= half; i += kFloatLanes) {
        const VF32 a = hn::LoadU(d, x + i);
        const VF32 b = hn::LoadU(d, x + half + i);
        const VF32 c = hn::LoadU(d, cos + i);
        const VF32 s = hn::LoadU(d, sin + i);
        hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, x + i);
        hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, x + half + i);
      }
      for (; i < half; ++i) {
        const float a = x[i];
        const float b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
      }
    }
  });
  return {};
}

// z / (1 + exp(-z)) with exp(-z) = 2^n 2^(r log2(e)), r = -z - n ln 2 and ln 2 in two parts:
// rounding -z log2(e) as a whole would cost |z| / 2 ulp. Measured: 1.5 ulp. Beyond 88 the exponent
// is clamped, where the result is within 1e-36 of z or of 0; NaN stays NaN.
inline VF32 silu(VF32 z) {
  const F32 d;
  const hn::RebindToSigned<F32> di;
  const VF32 log2_e = hn::Set(d, 0x1.715476p+0f);
  const VF32 minus = hn::Max(hn::Set(d, -88.0f), hn::Min(hn::Set(d, 88.0f), hn::Neg(z)));
  const VF32 n = hn::Round(hn::Mul(minus, log2_e));
  const VF32 high = hn::NegMulAdd(n, hn::Set(d, 0x1.63p-1f), minus);  // exact
  const VF32 r = hn::NegMulAdd(n, hn::Set(d, -0x1.bd0106p-13f), high);
  const auto biased = hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127));
  const VF32 power = hn::BitCast(d, hn::ShiftLeft<23>(biased));  // 2^-127 as 0
  const VF32 e = hn::Mul(exp2(hn::Mul(r, log2_e)), power);
  return hn::Div(z, hn::Add(hn::Set(d, 1.0f), e));
}

inline Status run_swiglu(const Backend& backend, const SwigluParams& params, std::span<std::byte>) {
  const std::int64_t width = params.width;
  for_tokens(backend, params.tokens, width, [&](std::int64_t t) {
    const F32 d;
    const float* gate = static_cast<const float*>(params.x) + t * 2 * width;
    const float* up = gate + width;
    float* y = static_cast<float*>(params.y) + t * width;
    std::int64_t i = 0;
    for (; i + kFloatLanes <= width; i += kFloatLanes) {
      hn::StoreU(hn::Mul(silu(hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d, y + i);
    }
    if (i < width) {  // the same arithmetic on a padded vector
      HWY_ALIGN float tail[2 * kFloatLanes] = {};
      const auto bytes = static_cast<std::size_t>(width - i) * sizeof(float);
      std::memcpy(tail, gate + i, bytes);
      std::memcpy(tail + kFloatLanes, up + i, bytes);
      hn::Store(hn::Mul(silu(hn::Load(d, tail)), hn::Load(d, tail + kFloatLanes)), d, tail);
      std::memcpy(y + i, tail, bytes);
    }
  });
  return {};
}

inline Status run_embed(const Backend& backend, const EmbedParams& params, std::span<std::byte>) {
  const TensorView& table = params.table->values;
  const std::int64_t width = table.shape[1];
  for_tokens(backend, params.tokens, width, [&](std::int64_t t) {
    const F32 d;
    float* y = static_cast<float*>(params.y) + t * width;
    read_elements(table, params.token_ids[t] * width, width, y);
    std::int64_t i = 0;
    for (; i + kFloatLanes <= width; i += kFloatLanes) {
      hn::StoreU(hn::Mul(hn::LoadU(d, y + i), hn::Set(d, params.scale)), d, y + i);
    }
    for (; i < width; ++i) y[i] *= params.scale;
  });
  return {};
}

inline Status run_gather(const Backend& backend, const GatherParams& params, std::span<std::byte>) {
  for_tokens(backend, params.count, params.width, [&](std::int64_t i) {
    const std::int64_t row = params.rows == nullptr ? i : params.rows[i];
    std::memcpy(static_cast<float*>(params.y) + i * params.width,
                static_cast<const float*>(params.x) + row * params.row_stride + params.first_column,
                static_cast<std::size_t>(params.width) * sizeof(float));
  });
  return {};
}

INFLLM_CPU_END
