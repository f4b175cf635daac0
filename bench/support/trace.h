// SPDX-License-Identifier: Apache-2.0
//
// Selections as a trained model makes them: a checkpoint reads a text, and one of its layers says
// which blocks its tokens attend to. Kernels whose speed depends on how much neighbours share are
// measured with these.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "infllm/ops/backend.h"
#include "infllm/ops/sparse_config.h"

namespace infllm::bench {

struct Trace {
  std::vector<std::int32_t> selection;  // [heads_kv, tokens, columns]
  std::int32_t heads_kv = 0;
  std::int32_t columns = 0;
  double overlap = 0;  // of neighbours' freely chosen blocks
};

struct TraceOptions {
  std::string model;  // a checkpoint folder
  std::string text;   // a file, read over and over until it has `tokens` tokens
  std::int32_t tokens = 0;
  std::int32_t layer = 0;
};

// `config` replaces the checkpoint's: its budget is the kernel's under test. All tokens attend
// sparsely.
Result<Trace> trace_selection(const Backend& backend, const SparseConfig& config,
                              const TraceOptions& options);

}  // namespace infllm::bench
