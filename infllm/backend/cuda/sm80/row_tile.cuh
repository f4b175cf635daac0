// SPDX-License-Identifier: Apache-2.0
//
// What the kernels that walk the blocks of a tile of tokens share (attend.cu and the way back's
// backward/query_gradient.cu): the tile's rows, 32 for each warp, the blocks that they want, how
// rows come in and go out.
//
//   class Attender : RowTile<T, D, Shape::kWarps, AttendArgs> { ... };
//   load_rows(shared.q, q);                                  // by cp.async, the tile's rows
//   for (int j = 0; j < count; ++j) {
//     const Visit at = look_up(j);
//     if (!wants(at)) continue;                              // this warp's tokens
//     ...; mask(s, at, first_key);                           // -inf where a row must not look
//   }
//   store_rows(stage, o, factors, out);                      // the warp's rows of o, times factors
//
// A lane's rows of its warp's 32 are lane / 4 + 0, 8, 16, 24; accumulators are as in
// warp_products.cuh.
#pragma once

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm80/token_tile.cuh"
#include "infllm/backend/cuda/sm80/union_lists.h"
#include "infllm/backend/cuda/sm80/warp_products.cuh"

namespace infllm::cuda::sm80 {

// Thread blocks in two sizes.
//   Dense: 128 rows; every warp needs every block.
//   Sparse: warps of a thread block wait for each other at every block that one of them needs, so
//   fewer tokens together waste less: 64 rows. Needs room for two tokens.
inline constexpr int kDenseWarps = 4;
inline constexpr int kSparseWarps = 2;

inline bool is_sparse_shape(const AttendParams& params) {
  return is_sparse(params) &&
         2 * (params.heads_q / params.pages.layout.kv_heads) <= kSparseWarps * kWarpRows;
}

// Tokens of a tile.
inline int row_tile_tokens(const AttendParams& params) {
  const int rows = (is_sparse_shape(params) ? kSparseWarps : kDenseWarps) * kWarpRows;
  const int fit = rows / (params.heads_q / params.pages.layout.kv_heads);
  return params.selection == nullptr ? fit : std::min(fit, kUnionTokens);
}

// A block to visit.
struct Visit {
  std::int32_t block;
  std::int32_t page;
  std::uint32_t tokens;  // of the tile, who wants it; 0 if it has no page
};

// Args has pool, batch, lists (without entries: all sequences are dense), heads_q, group.
template <typename T, int D, int kWarps, class Args>
class RowTile {
 public:
  using Smem = SmemTile<D>;
  static constexpr int kThreads = kWarps * 32;

 protected:
  __device__ RowTile(const Args& args, const TokenTile& tile, int slot)
      : a_(args),
        tile_(tile),
        sequence_(args.batch, tile.sequence),
        head_(static_cast<int>(blockIdx.y)),
        warp_(tile::warp_index()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        rows_(tile.tokens * args.group),
        sparse_(args.lists.entries != nullptr && sequence_.sparse) {
    const std::int64_t list = head_ * a_.lists.slots + slot;
    list_ = a_.lists.entries + list * a_.lists.capacity;
    count_ = sparse_ ? a_.lists.counts[list] : (tile.first + tile.tokens - 1) / kPageTokens + 1;
    const int first_row = warp_ * kWarpRows;
    const int last_row = min(first_row + kWarpRows, rows_) - 1;
    first_token_ = first_row / a_.group;
    last_token_ = last_row < first_row ? -1 : last_row / a_.group;
    // Dense visits carry all bits, so any bits will do.
    warp_tokens_ = last_token_ < 0 ? 0
                   : sparse_       ? (~0u >> (31 - last_token_)) & (~0u << first_token_)
                                   : 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) token_[i] = min(row(i), rows_ - 1) / a_.group;
  }

  // The lane's row i of the tile.
  __device__ int row(int i) const {
    return warp_ * kWarpRows + i / 2 * 16 + i % 2 * 8 + (lane_ >> 2);
  }
  // Query head of a row of the tile.
  __device__ std::int64_t query_head(int row) const {
    return head_ * a_.group + row - row / a_.group * a_.group;
  }
  // The row's place in [T, Hq].
  __device__ std::int64_t packed_row(int row) const {
    return std::int64_t{tile_.token + row / a_.group} * a_.heads_q + query_head(row);
  }

  // Starts copies of the tile's rows, zeros behind them.
  __device__ void load_rows(std::byte* to, const T* from) const {
    for (int i = static_cast<int>(threadIdx.x); i < kWarps * kWarpRows * Smem::kPieces;
         i += kThreads) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      tile::cp_async_16(to + Smem::offset(row, piece),
                        from + packed_row(min(row, rows_ - 1)) * D + piece * 8, row < rows_);
    }
  }

  // j < count_.
  __device__ Visit look_up(int j) const {
    const UnionEntry entry = sparse_ ? list_[j] : UnionEntry{j, ~0u};
    const int page = sequence_.page(entry.block, a_.pool.num_pages);
    return {entry.block, page, page < 0 ? 0 : entry.tokens};
  }

  // Starts copies of the block's keys or values. Rows behind the sequence's end are zeros: whatever
  // is there must not meet a weight of zero.
  __device__ void load_plane(std::byte* to, const Visit& at, std::int64_t offset) const {
    Smem::template load<kPageTokens, kThreads>(
        to, a_.pool.template plane<const std::byte>(max(at.page, 0), offset),
        at.page < 0 ? 0 : sequence_.length - at.block * kPageTokens);
  }

  __device__ bool wants(const Visit& at) const {
    return (at.tokens & warp_tokens_) != 0 && at.block * kPageTokens <= tile_.first + last_token_;
  }

  // -inf for the rows of tokens that did not choose the block and for keys behind the token.
  template <int kColumns>
  __device__ void mask(float (&s)[2][kColumns][4], const Visit& at, int first_key) const {
    const bool own = first_key + 8 * kColumns - 1 > tile_.first + first_token_;
    if (!own && (at.tokens & warp_tokens_) == warp_tokens_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool chosen = !sparse_ || (at.tokens >> token_[i] & 1) != 0;
      const int keys = chosen ? tile_.first + token_[i] + 1 - first_key : 0;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int key = n * 8 + (lane_ & 3) * 2;
        if (key >= keys) s[i / 2][n][i % 2 * 2] = -INFINITY;
        if (key + 1 >= keys) s[i / 2][n][i % 2 * 2 + 1] = -INFINITY;
      }
    }
  }

  // Writes the warp's rows of x, row i of the lane times factors[i], through its own part of
  // `rows`, a tile of rows in shared memory that nobody else reads any more.
  __device__ void store_rows(std::byte* rows, const float (&x)[2][D / 8][4],
                             const float (&factors)[4], T* to) const {
    const int first_row = warp_ * kWarpRows;
    std::byte* stage = rows + first_row * Smem::kRowBytes;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(stage + Smem::offset(row(i) - first_row, n) +
                                          (lane_ & 3) * 4) =
            tile::pack2<T>(x[i / 2][n][i % 2 * 2] * factors[i],
                           x[i / 2][n][i % 2 * 2 + 1] * factors[i]);
      }
    }
    __syncwarp();
    const int count = min(kWarpRows, rows_ - first_row);
    for (int i = lane_; i < count * Smem::kPieces; i += 32) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      *reinterpret_cast<uint4*>(to + packed_row(first_row + row) * D + piece * 8) =
          *reinterpret_cast<const uint4*>(stage + Smem::offset(row, piece));
    }
  }

  const Args& a_;
  const TokenTile tile_;
  const Sequence sequence_;
  const int head_;
  const int warp_;
  const int lane_;
  const int rows_;
  const bool sparse_;
  const UnionEntry* list_;
  int count_;                  // blocks to visit
  int first_token_;            // of the warp's rows, within the tile
  int last_token_;             // -1: the warp has no rows
  std::uint32_t warp_tokens_;  // as bits
  int token_[4];               // of the lane's rows
};

// Calls run(tile, slot) in a thread block (x, y): KV head y, a tile of tokens, the late and long
// ones first.
template <class Args, class Run>
__device__ __forceinline__ void with_row_tile(const Args& args, Run&& run) {
  const int slot = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const TokenTile tile = token_tile(args.batch, args.tile_tokens, slot);
  if (tile.tokens > 0) run(tile, slot);
}

// Launches a kernel with kBytes of shared memory for all tiles of a batch.
template <std::size_t kBytes, int kWarps, class Args>
Status launch_row_tiles(const char* what, void (*kernel)(Args), const Args& args,
                        cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tile_slots(args.batch, args.tile_tokens)),
                  static_cast<unsigned>(args.pool.map.heads));
  return start(what, kernel, grid, kWarps * 32, kBytes, stream, args);
}

// Calls run.template operator()<T, D, kWarps>() for what the call needs.
template <class Run>
Status with_row_shape(const AttendParams& params, Run&& run) {
  const bool sparse = is_sparse_shape(params);
  return with_shape(params.pages.layout, [&]<typename T, int D>() {
    return sparse ? run.template operator()<T, D, kSparseWarps>()
                  : run.template operator()<T, D, kDenseWarps>();
  });
}

}  // namespace infllm::cuda::sm80
