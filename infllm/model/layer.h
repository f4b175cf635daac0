// SPDX-License-Identifier: Apache-2.0
//
// The two halves of a transformer layer, each of which adds to the residual stream:
//
//   attention_layer:  h += s o_proj(attention(q, k, v)),  [q k v] = qkv_proj(norm(h))
//   mlp_layer:        h += s down(silu(gate x) up x),      x = norm(h)
#pragma once

#include <chrono>
#include <cstddef>
#include <span>

#include "infllm/model/config.h"
#include "infllm/model/model.h"
#include "infllm/model/weights.h"

namespace infllm::model {

// Byte offsets of a step's activations in the workspace. The layers run one after the other, so
// they share everything, and the halves of a layer share what is theirs alone.
struct ActivationPlan {
  std::size_t hidden = 0;   // [T, H] the residual stream
  std::size_t normed = 0;   // [T, H]
  std::size_t cos = 0;      // [T, D / 2] float
  std::size_t sin = 0;      // [T, D / 2] float
  std::size_t qkv = 0;      // [T, (Hq + 2 Hkv) D]; then the attention's output [T, Hq D]
  std::size_t q = 0;        // [T, Hq, D]
  std::size_t k = 0;        // [T, Hkv, D]
  std::size_t v = 0;        // [T, Hkv, D]
  std::size_t q_score = 0;  // [T, Hq, D] before RoPE, only with use_nope
  std::size_t k_score = 0;  // [T, Hkv, D] before RoPE, only with use_nope
  std::size_t gate_up = 0;  // [T, 2 I], over qkv and its successors
  std::size_t gated = 0;    // [T, I]
  std::size_t picked = 0;   // [R, H] rows that need logits, over normed and its successors
  std::size_t bytes = 0;    // of all
};
ActivationPlan plan_activations(const ModelConfig& config, std::int64_t activation_bytes,
                                std::int64_t tokens, std::int64_t num_logits);

// What both halves need of the step.
struct Step {
  const Backend& backend;
  const ModelConfig& config;
  const Batch& batch;
  ActivationPlan plan;
  std::byte* activations = nullptr;
  std::span<std::byte> workspace;  // for the operations
  ForwardTimes* times = nullptr;

  void* at(std::size_t offset) const { return activations + offset; }
  float* floats_at(std::size_t offset) const {
    return reinterpret_cast<float*>(activations + offset);
  }
};

// y = linear(rms_norm(h)) of rows of the residual stream, in one step where the column has it;
// `normed` is for the numbers in between. The product counts as `part`.
Status normed_linear(const Step& step, const Buffer& norm, LinearParams params, void* normed,
                     double ForwardTimes::*part);

Status attention_layer(const Step& step, const LayerWeights& weights, const KvPages& pages);
Status mlp_layer(const Step& step, const LayerWeights& weights);

// The attention operation's parameters, without its arrays: what its workspace depends on.
AttentionParams attention_params(const ModelConfig& config, const KvPages& pages,
                                 const Batch& batch);

// Runs one part and adds the time it took, if anybody asked; on a device that means to wait for it.
template <typename Part>
Status timed(const Step& step, double ForwardTimes::*seconds, Part&& part) {
  if (step.times == nullptr) return part();
  INFLLM_TRY(synchronize(step.backend));
  const auto start = std::chrono::steady_clock::now();
  INFLLM_TRY(part());
  INFLLM_TRY(synchronize(step.backend));
  step.times->*seconds +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {};
}

}  // namespace infllm::model
