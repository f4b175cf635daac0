// SPDX-License-Identifier: Apache-2.0
//
// dQ of a tile of neighbouring tokens, 32 rows a warp. Like the forward pass (sm80/attend.cu), the
// tile walks the union of its tokens' blocks once, or all causal ones in a dense sequence:
//
//   S = Q K^T   dP = dO V^T   dS = 2^(c S - LSE) (dP - Delta)   ->   dQ += dS K
//
// half a block of keys at a time, because dQ takes 128 registers a thread for D = 128 and S and dP
// of 32 keys 32 each. A block needs its keys from the first product to the last, so K and V are
// loaded together, without a ring; several thread blocks on a multiprocessor cover for each other's
// loads. Masked logits are -inf and their weights exact zeros, so a row's result does not depend on
// who shares its tile.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "infllm/backend/cuda/backward/passes.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm80/token_tile.cuh"
#include "infllm/backend/cuda/sm80/warp_products.cuh"

namespace infllm::cuda::backward {
namespace {

using sm80::kWarpRows;
using sm80::SmemTile;
using sm80::TokenTile;
using sm80::UnionEntry;

constexpr int kDenseWarps = 4;
constexpr int kSparseWarps = 2;  // small unions, as in the forward pass
constexpr int kHalfKeys = kPageTokens / 2;

// Thread blocks on a multiprocessor: what shared memory (D = 128) lets be there together.
constexpr int resident(int warps) { return warps == kDenseWarps ? 2 : 3; }

// A block to visit.
struct Visit {
  std::int32_t block;
  std::uint32_t tokens;  // of the tile, who wants it
  std::int32_t page;     // -1: none
};

template <int D, int kWarps>
struct Shared {
  std::byte q[kWarps * kWarpRows * 2 * D];
  std::byte grad_o[kWarps * kWarpRows * 2 * D];
  std::byte k[kPageTokens * 2 * D];
  std::byte v[kPageTokens * 2 * D];
};

template <typename T, int D, int kWarps>
class QueryGradient {
 public:
  using Smem = SmemTile<D>;
  static constexpr int kThreads = kWarps * 32;

  __device__ QueryGradient(const BackwardArgs& args, Shared<D, kWarps>& shared,
                           const TokenTile& tile, int slot)
      : a_(args),
        shared_(shared),
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
    warp_tokens_ = last_token_ < 0 ? 0
                   : sparse_       ? (~0u >> (31 - last_token_)) & (~0u << first_token_)
                                   : 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(first_row + i / 2 * 16 + i % 2 * 8 + (lane_ >> 2), rows_ - 1);
      token_[i] = row / a_.group;
      stats_[i] = a_.stats[packed_row(row)];
    }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) grad_q_[mi][n][e] = 0;
      }
    }
  }

  __device__ void run() {
    load_rows(shared_.q, static_cast<const T*>(a_.q));
    load_rows(shared_.grad_o, static_cast<const T*>(a_.grad_o));
    tile::cp_async_commit();  // even if no block follows, whose copies would take them along
    Visit next = look_up(0);
    for (int j = 0; j < count_; ++j) {
      const Visit at = next;
      __syncthreads();  // everybody is done with the block before
      load_plane(shared_.k, at, a_.pool.map.key(head_));
      load_plane(shared_.v, at, a_.pool.map.value(head_));
      tile::cp_async_commit();
      next = look_up(j + 1);
      tile::cp_async_wait<0>();
      __syncthreads();
      const bool wanted = at.page >= 0 && (at.tokens & warp_tokens_) != 0 &&
                          at.block * kPageTokens <= tile_.first + last_token_;
      if (!wanted) continue;
      add_half<0>(at);
      add_half<1>(at);
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // the rows have arrived even if there was no block
    finish();
  }

 private:
  // Of the tile's row, in [T, Hq].
  __device__ std::int64_t packed_row(int row) const {
    const int token = row / a_.group;
    const std::int64_t head = head_ * a_.group + row - token * a_.group;
    return std::int64_t{tile_.token + token} * a_.heads_q + head;
  }

  __device__ void load_rows(std::byte* to, const T* from) {
    for (int i = static_cast<int>(threadIdx.x); i < kWarps * kWarpRows * Smem::kPieces;
         i += kThreads) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      tile::cp_async_16(to + Smem::offset(row, piece),
                        from + packed_row(min(row, rows_ - 1)) * D + piece * 8, row < rows_);
    }
  }

  __device__ Visit look_up(int j) const {
    if (j >= count_) return {0, 0, -1};
    const UnionEntry entry = sparse_ ? list_[j] : UnionEntry{j, ~0u};
    return {entry.block, entry.tokens, sequence_.page(entry.block, a_.pool.num_pages)};
  }

  // Keys behind the sequence's end are zeros: whatever is there must not meet a weight of zero.
  __device__ void load_plane(std::byte* to, const Visit& at, std::int64_t offset) {
    Smem::template load<kPageTokens, kThreads>(
        to, a_.pool.plane<const std::byte>(max(at.page, 0), offset),
        at.page < 0 ? 0 : sequence_.length - at.block * kPageTokens);
  }

  template <int kHalf>
  __device__ void add_half(const Visit& at) {
    constexpr int kFirst = kHalf * kHalfKeys;
    float s[2][4][4];
    float grad_p[2][4][4];
    const int row = warp_ * kWarpRows;
    sm80::multiply_transposed<T, D>(s, shared_.q, row, shared_.k, kFirst, lane_);
    sm80::multiply_transposed<T, D>(grad_p, shared_.grad_o, row, shared_.v, kFirst, lane_);
    mask(s, at, at.block * kPageTokens + kFirst);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[i / 2][n][i % 2 * 2 + e];
          const float p = tile::fast_exp2(fmaf(x, a_.c, -stats_[i].lse));
          x = p * (grad_p[i / 2][n][i % 2 * 2 + e] - stats_[i].delta);
        }
      }
    }
    sm80::multiply_add<T, D>(grad_q_, s, shared_.k, kFirst, lane_);  // dQ += dS K
  }

  // -inf for the rows of tokens that did not choose the block and for keys behind the token.
  __device__ void mask(float (&s)[2][4][4], const Visit& at, int first_key) const {
    const bool own = first_key + kHalfKeys - 1 > tile_.first + first_token_;
    if (!own && (at.tokens & warp_tokens_) == warp_tokens_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool chosen = !sparse_ || (at.tokens >> token_[i] & 1) != 0;
      const int keys = chosen ? tile_.first + token_[i] + 1 - first_key : 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int key = n * 8 + (lane_ & 3) * 2;
        if (key >= keys) s[i / 2][n][i % 2 * 2] = -INFINITY;
        if (key + 1 >= keys) s[i / 2][n][i % 2 * 2 + 1] = -INFINITY;
      }
    }
  }

  // Writes dQ through the warp's own rows of the query tile.
  __device__ void finish() {
    const int first_row = warp_ * kWarpRows;
    const int rows = min(kWarpRows, rows_ - first_row);
    if (rows <= 0) return;
    std::byte* stage = shared_.q + first_row * Smem::kRowBytes;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * 16 + i % 2 * 8 + (lane_ >> 2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(stage + Smem::offset(row, n) + (lane_ & 3) * 4) =
            tile::pack2<T>(grad_q_[i / 2][n][i % 2 * 2] * a_.scale,
                           grad_q_[i / 2][n][i % 2 * 2 + 1] * a_.scale);
      }
    }
    __syncwarp();
    T* out = static_cast<T*>(a_.grad_q);
    for (int i = lane_; i < rows * Smem::kPieces; i += 32) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      *reinterpret_cast<uint4*>(out + packed_row(first_row + row) * D + piece * 8) =
          *reinterpret_cast<const uint4*>(stage + Smem::offset(row, piece));
    }
  }

  const BackwardArgs& a_;
  Shared<D, kWarps>& shared_;
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
  int token_[4];               // of this lane's rows: lane / 4 + 0, 8, 16, 24
  RowStatistics stats_[4];
  float grad_q_[2][D / 8][4];
};

// Block (x, y): KV head y, a tile of tokens, the late and long ones first.
template <typename T, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, resident(kWarps))
    query_gradient_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  const int slot = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const TokenTile tile = sm80::token_tile(args.batch, args.tile_tokens, slot);
  if (tile.tokens == 0) return;
  auto& shared = *reinterpret_cast<Shared<D, kWarps>*>(memory);
  QueryGradient<T, D, kWarps>(args, shared, tile, slot).run();
}

// Few rows need room for two tokens.
bool is_sparse_shape(const AttendParams& params) {
  return params.selection != nullptr && params.batch.any_sparse &&
         2 * (params.heads_q / params.pages.layout.kv_heads) <= kSparseWarps * kWarpRows;
}

template <typename T, int D, int kWarps>
Status launch(const Device& device, const BackwardArgs& args) {
  constexpr auto kernel = query_gradient_kernel<T, D, kWarps>;
  constexpr int kBytes = sizeof(Shared<D, kWarps>);
  INFLLM_TRY(
      to_status("attend_backward",
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  const dim3 grid(static_cast<unsigned>(sm80::tile_slots(args.batch, args.tile_tokens)),
                  static_cast<unsigned>(args.pool.map.heads));
  kernel<<<grid, kWarps * 32, kBytes, device.stream>>>(args);
  return launched("attend_backward");
}

}  // namespace

int tile_tokens(const AttendParams& params) {
  const int rows = (is_sparse_shape(params) ? kSparseWarps : kDenseWarps) * kWarpRows;
  const int fit = rows / (params.heads_q / params.pages.layout.kv_heads);
  return params.selection == nullptr ? fit : std::min(fit, sm80::kUnionTokens);
}

Status query_gradient(const Backend& backend, const AttendParams& forward,
                      const BackwardArgs& args) {
  const Device& device = device_of(backend);
  const KvLayout& layout = forward.pages.layout;
  return with_type(layout.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_sparse_shape(forward)) {
      return layout.head_dim == 128 ? launch<T, 128, kSparseWarps>(device, args)
                                    : launch<T, 64, kSparseWarps>(device, args);
    }
    return layout.head_dim == 128 ? launch<T, 128, kDenseWarps>(device, args)
                                  : launch<T, 64, kDenseWarps>(device, args);
  });
}

}  // namespace infllm::cuda::backward
