// SPDX-License-Identifier: Apache-2.0
//
// A transformer of the MiniCPM4 family on an open backend. One step over a ragged batch:
//
//   h = scale_emb E[token]
//   every layer:  h += s o_proj(attention(norm(h)));  h += s down(silu(gate x) up x), x = norm(h)
//   logits = W norm(h) dim_model_base / H             s = scale_depth / sqrt(layers)
//
//   Model model = INFLLM_TRY(Model::load(backend, config, *source));
//   Buffer workspace = INFLLM_TRY(allocate(backend, model.workspace_bytes(limits)));
//   INFLLM_TRY(model.forward({.batch = batch, .token_ids = ids, .positions = positions,
//                             .pages = pages, .logit_rows = rows, .num_logits = 1,
//                             .logits = logits, .workspace = {workspace.data(), bytes}}));
//   INFLLM_TRY(read_floats(backend, logits, vocab, host_logits));
//
// forward() neither allocates nor keeps anything between calls: sequences live in their pages. It
// reads no array on the host and waits for nothing (unless asked for times), so a device can record
// it. Prefill, chunked prefill, decoding and mixtures are one code path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "infllm/core/status.h"
#include "infllm/model/config.h"
#include "infllm/model/weights.h"
#include "infllm/ops/attention.h"
#include "infllm/ops/backend.h"
#include "infllm/ops/batch.h"
#include "infllm/ops/kv_cache.h"

namespace infllm::model {

// Where the time of forward() went, in seconds; added to, never reset. Measuring waits for each
// part to finish, so a device backend pays for it.
struct ForwardTimes {
  StepTimes attention;  // compress, score, select, attend
  double embed = 0;     // table look-up and rotary tables
  double norm = 0;
  double projections = 0;  // qkv and o
  double rope = 0;         // rotation and cutting qkv apart
  double cache = 0;        // kv_append
  double mlp = 0;          // gate, up, swiglu, down
  double head = 0;         // gather, final norm and logits

  double total() const;
};

// Told of each layer's attention after it: its queries and cache are still in their places.
using AttentionObserver = std::function<Status(std::int32_t layer, const AttentionParams&)>;

struct ForwardParams {
  Batch batch;                              // arrays in the backend's memory
  const std::int32_t* token_ids = nullptr;  // [T] backend's memory, each in [0, V)
  const std::int32_t* positions = nullptr;  // [T] backend's memory, as the batch implies them
  // [T] backend's memory: tokens of the sequence this token belongs to, its whole prompt counted
  // while that is being prefilled. Chooses LongRoPE's factors. Null: position + 1.
  const std::int32_t* lengths = nullptr;
  std::span<const KvPages> pages;  // one per layer, of kv_layout() or the same with another type
  // [R] backend's memory: packed tokens that need logits. Null: every token, R = T.
  const std::int32_t* logit_rows = nullptr;
  std::int32_t num_logits = 0;     // R; 0: none (a chunk that is not the prompt's last)
  void* logits = nullptr;          // [R, V] activation type
  std::span<std::byte> workspace;  // at least workspace_bytes(batch, R)
  ForwardTimes* times = nullptr;   // may be null
  const AttentionObserver* observer = nullptr;  // may be null
};

// The largest step that a workspace must hold.
struct StepLimits {
  std::int32_t max_tokens = 0;     // of a step, all sequences together
  std::int32_t max_sequences = 1;  // of a step
  std::int32_t max_kv_length = 0;  // of a sequence
  std::int32_t max_logits = 1;     // rows with logits
};

class Model {
 public:
  // The backend is copied: it is a handle.
  static Result<Model> load(const Backend& backend, const ModelConfig& config,
                            const WeightSource& source, const LoadOptions& options = {});

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  const Backend& backend() const { return backend_; }

  // The cache of every layer.
  KvLayout kv_layout() const { return config_.kv_layout(kv_dtype()); }
  DType kv_dtype() const { return default_kv_dtype(backend_, weights_.format); }

  Status forward(const ForwardParams& params) const;

  // For one step (reads the batch's host numbers only), and for all steps within limits.
  std::size_t workspace_bytes(const Batch& batch, std::int32_t num_logits) const;
  std::size_t workspace_bytes(const StepLimits& limits) const;
  // [rows, V] of the activation type.
  std::size_t logits_bytes(std::int32_t rows) const;

 private:
  Model(Backend backend, ModelConfig config, Weights weights);

  Backend backend_;
  ModelConfig config_;
  Weights weights_;
  Rope rope_;
  Buffer rope_numbers_;  // rope_.numbers() in the backend's memory
};

}  // namespace infllm::model
