// SPDX-License-Identifier: Apache-2.0
//
// Everything between one attention and the next as one step, for columns that gain from having it
// in one piece:
//
//   h += s O(a)
//   h += s D(silu(g) u),   [g u] = G(norm(h))
//   y  = t W(norm'(h))      W: the next layer's fused projection, or after the last layer the head
//
// What linear(), rms_norm() and swiglu() do one after the other, rounded where they round: norms,
// g, u and h. A column may lack this step, or not cover a shape; its caller takes the long way.
#pragma once

#include "infllm/ops/transformer.h"

namespace infllm {

struct InterludeParams {
  std::int64_t tokens = 0;
  const LinearWeight* o = nullptr;        // [H, A]
  const LinearWeight* gate_up = nullptr;  // [2 I, H]
  const LinearWeight* down = nullptr;     // [H, I]
  const LinearWeight* next = nullptr;     // [outputs, H]; null: nothing follows
  const void* mlp_norm = nullptr;         // [H] accumulate type
  const void* next_norm = nullptr;        // [H]
  float epsilon = 0;
  float residual_scale = 1;        // s
  float next_scale = 1;            // t
  const void* attended = nullptr;  // a [T, A]
  void* hidden = nullptr;          // h [T, H]
  void* gated = nullptr;           // [T, I] scratch
  void* y = nullptr;               // [T, outputs]
};

bool has_interlude(const Backend& backend, const InterludeParams& params);
Status interlude(const Backend& backend, const InterludeParams& params);

}  // namespace infllm
