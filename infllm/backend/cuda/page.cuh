// SPDX-License-Identifier: Apache-2.0
//
// How the CUDA columns lay a cache page out, and how a kernel finds its rows. A page holds 64
// tokens of every KV head as plain row-major planes of the column's activation type:
//
//   keys   [Hkv][64][D]    values [Hkv][64][D]    (use_nope: keys before RoPE [Hkv][64][D])
//   fine   [Hkv][4][D]     coarse [Hkv][1][D]     pooled keys of the windows that begin in this
//   page
//
// Pages and planes of keys and values begin at multiples of 1024 bytes, so that one 5-D tensor map
// reaches any (page, head) plane and the copy engine's 128-byte swizzle makes the shared-memory
// tile. All offsets are in bytes.
//
//   const PagePool pool(params.pages);                      // host; passed to the kernel by value
//   const Sequence sequence(params.batch, blockIdx.y);      // device
//   const int page = sequence.page(block, pool.num_pages);  // -1: not there, treat as masked
//   const T* keys = pool.plane<const T>(page, pool.map.key(head));
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "infllm/ops/kv_cache.h"

namespace infllm::cuda {

inline constexpr int kPageTokens = 64;
inline constexpr int kFineStride = 16;  // tokens between fine windows
inline constexpr int kFineTokens = 32;  // of a fine window
inline constexpr int kFineRows = kPageTokens / kFineStride;
inline constexpr int kCoarseStride = 4 * kFineStride;
inline constexpr int kCoarseTokens = 4 * kFineTokens;
inline constexpr int kCoarseRows = kPageTokens / kCoarseStride;
inline constexpr int kPlaneAlignment = 1024;  // the swizzle pattern of the copy engine repeats here

// Offsets of the planes inside a page.
struct PageMap {
  explicit PageMap(const KvLayout& layout)
      : row_bytes(static_cast<std::int32_t>(layout.head_dim * size_of(layout.dtype))),
        heads(layout.kv_heads),
        full_planes(layout.score_keys() ? 3 : 2),
        pooled(layout.pooled_keys ? 1 : 0) {}

  // Head h's plane of [64][D] keys, values, and keys that are pooled: those before RoPE under
  // use_nope, the attended ones otherwise.
  __host__ __device__ std::int64_t key(int head) const { return head * plane_bytes(); }
  __host__ __device__ std::int64_t value(int head) const { return (heads + head) * plane_bytes(); }
  __host__ __device__ std::int64_t pooled_key(int head) const {
    return full_planes == 3 ? (2 * heads + head) * plane_bytes() : key(head);
  }
  // Head h's [4][D] fine and [1][D] coarse rows.
  __host__ __device__ std::int64_t fine(int head) const {
    return full_planes * heads * plane_bytes() + std::int64_t{head} * kFineRows * row_bytes;
  }
  __host__ __device__ std::int64_t coarse(int head) const {
    return fine(heads) + std::int64_t{head} * kCoarseRows * row_bytes;
  }
  // Of a whole page.
  __host__ __device__ std::int64_t bytes() const {
    const std::int64_t used = pooled != 0 ? coarse(heads) : full_planes * heads * plane_bytes();
    return (used + kPlaneAlignment - 1) / kPlaneAlignment * kPlaneAlignment;
  }

  __host__ __device__ std::int64_t plane_bytes() const {
    return std::int64_t{kPageTokens} * row_bytes;
  }

  std::int32_t row_bytes;    // of one token of one head
  std::int32_t heads;        // Hkv
  std::int32_t full_planes;  // of 64 rows a head: 2, or 3 under use_nope
  std::int32_t pooled;       // 1: fine and coarse rows exist
};

// The cache of one layer.
struct PagePool {
  explicit PagePool(const KvPages& pages)
      : data(static_cast<std::byte*>(pages.data)),
        page_bytes(pages.page_bytes),
        num_pages(pages.num_pages),
        map(pages.layout) {}

  // The plane at `offset` of a page that Sequence::page() found.
  template <typename T>
  __device__ T* plane(int page, std::int64_t offset) const {
    return reinterpret_cast<T*>(data + page * page_bytes + offset);
  }

  std::byte* data;
  std::int64_t page_bytes;
  std::int32_t num_pages;
  PageMap map;
};

// One sequence of the batch. Its numbers come from device memory, so that a captured graph follows
// them as they grow.
struct Sequence {
  __device__ Sequence(const Batch& batch, int index)
      : first_token(batch.query_start[index]),
        tokens(batch.query_start[index + 1] - first_token),
        length(batch.kv_length[index]),
        sparse(batch.any_sparse && batch.sparse[index] != 0),
        max_pages(batch.max_pages),
        table(batch.page_table + std::int64_t{index} * batch.max_pages) {}

  // The page of a block, or -1 where the table has none within [0, num_pages): never followed.
  __device__ int page(int block, int num_pages) const {
    if (block < 0 || block >= max_pages) return -1;
    const int found = table[block];
    return found >= 0 && found < num_pages ? found : -1;
  }

  // Position of this step's first token.
  __device__ int first_position() const { return length - tokens; }
  // Blocks that hold keys.
  __device__ int blocks() const { return (length + kPageTokens - 1) / kPageTokens; }

  std::int32_t first_token;  // on the packed axis
  std::int32_t tokens;       // of this step
  std::int32_t length;       // keys, this step's included
  bool sparse;
  std::int32_t max_pages;
  const std::int32_t* table;
};

// Fine and coarse windows that end within the first `length` tokens.
__host__ __device__ constexpr int fine_windows(int length) {
  return length < kFineTokens ? 0 : (length - kFineTokens) / kFineStride + 1;
}
__host__ __device__ constexpr int coarse_windows(int length) {
  return length < kCoarseTokens ? 0 : (length - kCoarseTokens) / kCoarseStride + 1;
}

}  // namespace infllm::cuda
