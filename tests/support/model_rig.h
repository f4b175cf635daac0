// SPDX-License-Identifier: Apache-2.0
//
// A model with caches for a few sequences, stepped by hand: what an engine does, without policy.
//
//   ModelRig rig(load_golden(open("cpu"), "minicpm-tied"), 2, 512);
//   std::vector<Row> logits = rig.step({{.sequence = 0, .tokens = prompt}});   // one per token
//
// Pages of the sequences are interleaved and start out as NaN, and so does the workspace, so that
// nothing can rely on fresh memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "infllm/model/model.h"

namespace infllm::testing {

using Row = std::vector<float>;  // logits of one token

// Tokens that one sequence adds in a step.
struct Chunk {
  std::int32_t sequence = 0;
  std::vector<std::int32_t> tokens;
  std::int32_t length = 0;  // of the whole prompt while it is prefilled; 0: what there is
};

class ModelRig {
 public:
  ModelRig(model::Model model, std::int32_t sequences, std::int32_t max_tokens);

  // Logits of every token of the step, in order.
  std::vector<Row> step(const std::vector<Chunk>& chunks);
  // The `count` tokens that follow, each the best of its logits.
  std::vector<std::int32_t> greedy(std::int32_t sequence, const std::vector<std::int32_t>& prompt,
                                   std::int32_t count);

  const model::Model& model() const { return model_; }
  std::span<const KvPages> pages() const { return pages_; }
  model::ForwardTimes times;  // of all steps

 private:
  Buffer upload(const void* data, std::size_t bytes);

  model::Model model_;
  std::int32_t sequences_;
  std::int32_t blocks_;  // per sequence
  std::vector<Buffer> memory_;
  std::vector<KvPages> pages_;
  std::vector<std::int32_t> page_table_;
  std::vector<std::int32_t> cached_;  // keys of each sequence
  Buffer workspace_;
};

// tests/golden/model/<name>, made by tools/make_model_golden.py.
struct ModelGolden {
  std::vector<std::int32_t> prompt, rows, greedy;
  std::vector<Row> logits;  // of rows, float32 run
  double margin = 0;        // the smallest of the greedy text, as a share of the best logit
  double bf16_error = 0;    // of the bf16 run's logits, absolute; 0 for float32 checkpoints
  double largest = 0;       // |logit|
};
std::filesystem::path golden_folder(const std::string& name);
ModelGolden read_golden(const std::string& name);
model::Model load_golden(const Backend& backend, const std::string& name,
                         const model::Overrides& overrides = {},
                         const model::LoadOptions& options = {});

// So low that a prompt of a hundred tokens can be sparse: blocks of 16, of which a token sees four.
model::Overrides sparse_from(std::int32_t dense_len);

inline constexpr std::int32_t kGoldenVocabulary = 320;
std::vector<std::int32_t> random_tokens(std::int32_t count, std::uint32_t seed);

// max |a - b| over all rows; infinite when a number is not finite or the shapes differ.
double distance(const std::vector<Row>& a, const std::vector<Row>& b);
std::vector<Row> pick(const std::vector<Row>& rows, const std::vector<std::int32_t>& which);

}  // namespace infllm::testing
