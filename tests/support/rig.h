// SPDX-License-Identifier: Apache-2.0
//
// One backend with the cache of one case on it. Steps of a schedule are entered one after another;
// within a step each operation can be run by itself, fed whatever a test wants to feed it.
//
//   Rig rig(backend, c, DType::kBF16);
//   rig.enter(c.steps[0]);                            // history, batch, append, compress
//   std::vector<double> scores = rig.score();         // [Hkv, T, N]
//   std::vector<std::int32_t> chosen = rig.select(scores);
//   Attended out = rig.attend(chosen);
//
// Everything that the operations must not rely on is hostile: page numbers are shuffled, table
// entries behind the last page are out of range, memory nobody wrote is NaN.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "infllm/ops/attend.h"
#include "infllm/ops/attention.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/score_select.h"
#include "tests/support/cases.h"
#include "tests/support/must.h"
#include "tests/support/numbers.h"

namespace infllm::testing {

// What the numbers of a test are rounded to, so that every backend and the reference see the same:
// the type of a column's activations where it has 16 bits, float32 elsewhere.
DType numbers_type(const Backend& backend);

struct Attended {
  std::vector<double> o;    // [T, Hq, D]
  std::vector<double> lse;  // [Hq, T]
};

struct CachedPlanes {
  std::vector<double> k, v, fine, coarse;  // of all sequences, packed
};

class Rig {
 public:
  // Numbers are those of the case, as the type `numbers` holds them.
  Rig(Backend backend, const Case& c, DType kv_dtype, DType numbers);
  Rig(Backend backend, const Case& c, DType kv_dtype)
      : Rig(backend, c, kv_dtype, numbers_type(backend)) {}

  // Appends and pools whatever comes before the spans, then the spans themselves as this step.
  void enter(const Step& step);

  // Whether entering pools the new keys; true until told otherwise.
  void pool_on_enter(bool pool) { pool_on_enter_ = pool; }

  std::vector<double> score();
  std::vector<std::int32_t> select(const std::vector<double>& scores);
  // As attention() chooses: in one step where the backend has it, else from its own scores.
  std::vector<std::int32_t> choose();
  Attended attend(const std::vector<std::int32_t>& selection);
  Attended attention(StepTimes* times = nullptr);
  CachedPlanes read();

  // Of the reference only: takes another column's pooled keys, to be fed the same input.
  void take_pooled(const CachedPlanes& planes);

  const Case& test_case() const { return case_; }
  const Backend& backend() const { return backend_; }
  const Batch& batch() const { return batch_; }
  const KvPages& pages() const { return pages_; }
  const SparseConfig& config() const { return case_.config; }
  std::vector<SequenceNumbers>& numbers() { return numbers_; }
  // [sequences, max_pages], to be broken by tests; the backend sees it when it is uploaded again.
  std::vector<std::int32_t>& page_table() { return page_table_; }
  void upload_page_table();
  std::int32_t tokens() const { return batch_.num_tokens; }
  std::int64_t blocks() const { return case_.config.blocks_in(batch_.max_kv_length); }
  // Of a selection; 0 when no sequence is sparse.
  std::int32_t columns() const;
  // The position of token t of the step, and whether its sequence is sparse.
  std::int64_t position(std::int32_t token) const { return positions_[token]; }
  bool sparse(std::int32_t token) const { return token_sparse_[token]; }
  float scale() const { return scale_; }

  ScoreSelectParams score_select_params(const Buffer& q) const;
  CompressParams compress_params() const { return {.pages = pages_, .batch = batch_}; }
  // The step's rows in activation type: [T, Hkv, D] and [T, Hq, D].
  Buffer key_rows(std::vector<double> SequenceNumbers::*rows) const;
  Buffer query_rows(Queries which) const;

 private:
  void run(const Step& step);
  AttendParams attend_params(Buffer& q, Buffer& o, Buffer& lse) const;

  Backend backend_;
  Case case_;
  DType numbers_type_;
  std::vector<SequenceNumbers> numbers_;
  float scale_;
  Buffer page_memory_;
  KvPages pages_;
  std::vector<std::int32_t> page_table_;
  std::vector<std::int32_t> cached_;  // keys of each sequence
  bool pool_on_enter_ = true;

  // The step's plan; the arrays live on the backend.
  Batch batch_;
  Step step_;
  Buffer starts_memory_, lengths_memory_, table_memory_, sparse_memory_;
  std::vector<std::int64_t> positions_;
  std::vector<bool> token_sparse_;
};

// Opens a backend on `threads` threads; 2 by default, so that work is shared even on one core.
Backend open(const std::string& name, int threads = 2);
// The reference, rounded where an honest kernel rounds that multiplies `operand`s and hands out
// `output`s.
Backend open_rounded(DType operand, DType output, int threads = 2);

}  // namespace infllm::testing
