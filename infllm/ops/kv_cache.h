// SPDX-License-Identifier: Apache-2.0
//
// The paged cache of one layer: keys, values and their pooled keys, a page of block_size tokens at
// a time. How a page is laid out inside belongs to the backend (a CPU keeps key pairs side by side
// for its dot product instruction), so pages are written with kv_append and compress, and read
// whole with kv_read.
//
//   KvLayout layout{.dtype = DType::kBF16, .kv_heads = 2, .head_dim = 128, .config = config};
//   INFLLM_TRY(check(backend, layout));
//   KvPages pages{buffer.data(), layout, kv_page_bytes(backend, layout), num_pages};
//   INFLLM_TRY(kv_append(backend, {.pages = pages, .batch = batch, .k = k, .v = v}));
//
// Pooled keys (spec: KC1, KC2) are kept in the page of their window's FIRST token, block_size /
// kernel_stride fine and block_size / (4 kernel_stride) coarse rows per page. They are pure
// functions of the cached keys, rounded once to dtype; truncating a sequence needs no call, because
// appending again emits the changed windows again.
#pragma once

#include <cstdint>

#include "infllm/core/dtype.h"
#include "infllm/ops/batch.h"
#include "infllm/ops/sparse_config.h"

namespace infllm {

struct Backend;

struct KvLayout {
  DType dtype = DType::kBF16;  // of keys, values and pooled keys in the cache
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  bool pooled_keys = true;  // false for a model that never attends sparsely
  SparseConfig config;      // block_size is the page's tokens; kernel_* size the pooled rows
  // A third plane with the keys before RoPE, which compress pools instead (use_nope).
  bool score_keys() const { return pooled_keys && config.use_nope; }
};

struct KvPages {
  void* data = nullptr;  // [num_pages, page_bytes]
  KvLayout layout;
  std::int64_t page_bytes = 0;
  std::int32_t num_pages = 0;
};

// What any column needs of a layout, and what this backend's column can hold.
Status check(const KvLayout& layout);
Status check(const Backend& backend, const KvLayout& layout);

// Of a layout that passes check().
std::int64_t kv_page_bytes(const Backend& backend, const KvLayout& layout);

// Writes the step's keys and values at their positions.
struct KvAppendParams {
  KvPages pages;
  Batch batch;
  const void* k = nullptr;        // [T, Hkv, D] activation type, after RoPE
  const void* v = nullptr;        // [T, Hkv, D]
  const void* k_score = nullptr;  // [T, Hkv, D] before RoPE, when layout.score_keys()
};
Status kv_append(const Backend& backend, const KvAppendParams& params);

// Reads planes of every sequence back, packed and unpooled: for tests, for gradients and for moving
// a cache between backends. Null outputs are skipped.
struct KvReadParams {
  KvPages pages;
  Batch batch;             // kv_length and page_table are used
  void* k = nullptr;       // [sum kv_length, Hkv, D] activation type
  void* v = nullptr;       // [sum kv_length, Hkv, D]
  void* fine = nullptr;    // [sum fine_windows(kv_length), Hkv, D]
  void* coarse = nullptr;  // [sum coarse_windows(kv_length), Hkv, D]
};
Status kv_read(const Backend& backend, const KvReadParams& params);

}  // namespace infllm
