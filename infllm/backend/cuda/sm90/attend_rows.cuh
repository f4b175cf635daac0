// SPDX-License-Identifier: Apache-2.0
//
// The 64 rows of a computing warpgroup: whose they are, how they come in, how they go out.
#pragma once

#include "infllm/backend/cuda/sm90/attend_config.cuh"
#include "infllm/backend/cuda/sm90/attend_softmax.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::cuda::sm90 {

// The same value in all lanes, and the compiler knows: descriptors of wgmma are made in uniform
// registers then, instead of being moved there before every product.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// Where the rows of a lane of a computing warpgroup belong. Everything follows from the tile, which
// stays in shared memory, and is computed again where it is needed: registers are short.
template <class C>
struct Rows {
  __device__ __forceinline__ Rows(const Tile& of, const AttendArgs& a, int warpgroup)
      : tile(of),
        group_log2(C::kGroup == 0 ? a.group_log2 : __ffs(C::kGroup) - 1),
        group(warpgroup),
        first(warpgroup * 64 + static_cast<int>(threadIdx.x % 128 / 32) * 16) {}

  // The tile's token of the lane's row 0 or 1, and its query head.
  __device__ __forceinline__ int row(int i) const {
    return first + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i;
  }
  __device__ __forceinline__ int token(int i) const { return row(i) >> group_log2; }
  __device__ __forceinline__ int head(int i) const {
    return (tile.head << group_log2) + (row(i) & ((1 << group_log2) - 1));
  }
  // The tile's token of the warp's and of the warpgroup's first row.
  __device__ __forceinline__ int warp_token() const { return first >> group_log2; }
  __device__ __forceinline__ int group_token() const { return group * 64 >> group_log2; }
  // The warpgroup's tokens as a set, and the block that all of them lie in.
  __device__ __forceinline__ std::uint64_t group_set() const {
    const int tokens = 64 >> group_log2;
    return (tokens == 64 ? ~0ull : (1ull << tokens) - 1) << group_token();
  }
  __device__ __forceinline__ int own_block() const {
    return (tile.position + group_token()) / kPageTokens;
  }
  // One of them is a token of the sequence.
  __device__ __forceinline__ bool in_use() const {
    const int token = tile.first_token + group_token();
    return token < tile.end && token + (64 >> group_log2) > tile.begin;
  }

  const Tile& tile;
  int group_log2;
  int group;
  int first;  // row of the warp
};

// The query rows of a warp as operand a: read from shared memory by each product, or held in
// registers, which halves the shared memory traffic of a product of 64 columns.
template <class C>
struct Queries {
  static constexpr int kSteps = C::kDim / 16;

  __device__ __forceinline__ explicit Queries(const std::byte* rows)
      : desc(tile::smem_desc_k_major(rows)) {}

  // Afterwards shared memory is not needed any more, if kHoldQueries.
  __device__ __forceinline__ void hold(const std::byte* rows) {
    if constexpr (C::kHoldQueries) {
      const int lane = static_cast<int>(threadIdx.x % 32);
      const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane % 16;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int unit = (k % 4 * 2 + lane / 16) ^ row % 8;  // swizzled
        tile::ldmatrix_x4(a[k], rows + k / 4 * kPanelBytes + row * 128 + unit * 16);
      }
    }
  }

  template <class Product, int kCount>
  __device__ __forceinline__ void multiply(float (&s)[kCount], std::uint64_t k_desc,
                                           int panel_bytes) const {
    tile::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const std::uint64_t at = k_desc + k / 4 * (panel_bytes / 16) + k % 4 * tile::kStepKMajor;
      if constexpr (C::kHoldQueries) {
        Product::rs(s, a[k][0], a[k][1], a[k][2], a[k][3], at, k != 0);
      } else {
        Product::ss(s, desc + k / 4 * (kPanelBytes / 16) + k % 4 * tile::kStepKMajor, at, k != 0);
      }
    }
    tile::wgmma_commit();
  }

  std::uint64_t desc;
  std::uint32_t a[kSteps][4];
};

// The last page of a sequence holds rows that nobody wrote. They may be NaN, and 0 x NaN is NaN.
template <class C>
__device__ __forceinline__ void clear_tail(std::byte* v, int first_row, int group) {
  for (int panel = 0; panel < C::kPanels; ++panel) {
    auto* words = reinterpret_cast<uint4*>(v + panel * kPanelBytes);
    for (int i = first_row * 8 + static_cast<int>(threadIdx.x % 128); i < 64 * 8; i += 128) {
      words[i] = uint4{0, 0, 0, 0};
    }
  }
  tile::fence_async_proxy();
  tile::named_barrier_sync(1 + group, 128);
}

// Writes one row's share of this quad: lane q of it holds columns 8 i + 2 q, + 1 as words[i]. Four
// exchanges give it columns 32 j + 8 q .. + 7 instead, which is one store of 16 bytes.
template <class C>
__device__ __forceinline__ void store_row(typename C::Type* row,
                                          std::uint32_t (&words)[C::kDim / 8], bool valid) {
  const int quad = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < C::kDim / 32; ++j) {
    std::uint32_t* w = words + 4 * j;
    // Transposes 4 x 4 words among the four lanes in two steps.
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const bool odd = quad & 1;
      const std::uint32_t give = odd ? w[i] : w[i + 1];
      const std::uint32_t got = __shfl_xor_sync(0xffffffff, give, 1);
      if (odd) {
        w[i] = got;
      } else {
        w[i + 1] = got;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool high = quad & 2;
      const std::uint32_t give = high ? w[i] : w[i + 2];
      const std::uint32_t got = __shfl_xor_sync(0xffffffff, give, 2);
      if (high) {
        w[i] = got;
      } else {
        w[i + 2] = got;
      }
    }
    if (valid) {
      *reinterpret_cast<uint4*>(row + 32 * j + 8 * quad) = uint4{w[0], w[1], w[2], w[3]};
    }
  }
}

template <class C>
__device__ __forceinline__ void store_tile(const AttendArgs& a, const Rows<C>& rows,
                                           const RowState (&state)[2],
                                           const float (&o)[C::kDim / 2]) {
  const Tile& tile = rows.tile;
  const int heads_q = a.heads << rows.group_log2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float l = quad_sum(state[i].l);
    const float inverse = l > 0 ? 1 / l : 0.0f;
    const int token = tile.first_token + rows.token(i);
    const bool valid = token >= tile.begin && token < tile.end;
    std::uint32_t words[C::kDim / 8];
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
      words[j] = infllm::cuda::tile::pack2<typename C::Type>(o[4 * j + 2 * i] * inverse,
                                                             o[4 * j + 2 * i + 1] * inverse);
    }
    const std::int64_t row = std::int64_t{token} * heads_q + rows.head(i);
    store_row<C>(static_cast<typename C::Type*>(a.o) + row * C::kDim, words, valid);
    if (a.lse != nullptr && valid && threadIdx.x % 4 == 0) {
      a.lse[std::int64_t{rows.head(i)} * a.batch.num_tokens + token] =
          l > 0 ? (state[i].m * a.c + log2f(l)) * kLn2 : -kInfinity;
    }
  }
}

}  // namespace infllm::cuda::sm90
