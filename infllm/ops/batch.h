// SPDX-License-Identifier: Apache-2.0
//
// The plan of one step: which tokens of which sequences run, and where their keys and values live.
// It is built once and read by every layer. Arrays live in the backend's memory.
//
// The step's tokens of sequence b are query_start[b] .. query_start[b+1]-1 of the packed token
// axis; they are the last ones of its kv_length[b] keys (bottom-right causal), so token i of them
// has the absolute position kv_length[b] - (query_start[b+1] - query_start[b]) + i.
#pragma once

#include <cstdint>

#include "infllm/core/status.h"

namespace infllm {

struct Batch {
  std::int32_t num_sequences = 0;             // B; a sequence may have no tokens in this step
  std::int32_t num_tokens = 0;                // T = query_start[B]
  const std::int32_t* query_start = nullptr;  // [B + 1]
  const std::int32_t* kv_length = nullptr;    // [B] keys, this step's tokens included
  const std::int32_t* page_table = nullptr;   // [B, max_pages] page of each block of the sequence
  std::int32_t max_pages = 0;                 // row length of page_table
  const std::uint8_t* sparse = nullptr;       // [B] 1: attend to selected blocks; null: all dense
  bool any_sparse = false;                    // host copy: some sparse[b] is 1
  std::int32_t max_query_length = 0;          // host copies, for grids and workspaces
  std::int32_t max_kv_length = 0;
};

// What the caller can get wrong without looking into device memory.
Status check(const Batch& batch);

// The same, and the arrays' contents: monotone starts, lengths that hold the tokens, pages within
// [0, num_pages). For host backends and for planners, before an upload.
Status check_contents(const Batch& host_batch, std::int32_t page_tokens, std::int32_t num_pages);

}  // namespace infllm
