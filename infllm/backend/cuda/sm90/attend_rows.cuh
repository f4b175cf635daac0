// SPDX-License-Identifier: Apache-2.0
//
// The 64 rows of a computing warpgroup: whose they are, what they see, how they go out.
#pragma once

#include "infllm/backend/cuda/sm90/attend_config.cuh"
#include "infllm/backend/cuda/sm90/attend_softmax.cuh"

namespace infllm::cuda::sm90 {

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

// Hides the keys after each row's token; s[0] is of the first key of `block`.
template <class C, int kCount>
__device__ __forceinline__ void mask_later(float (&s)[kCount], const Rows<C>& rows, int block) {
  const int first = rows.tile.position - block * kPageTokens;
  mask_beyond(s, {first + rows.token(0), first + rows.token(1)},
              static_cast<int>(threadIdx.x % 4) * 2);
}

// What a warp's first lane does with a block that nobody of the warpgroup wants.
template <class Shared, int kStages>
__device__ __forceinline__ void pass_block(Shared& shared, const RingCursor<kStages>& ring) {
  tile::mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
  tile::mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
  tile::mbarrier_wait(&shared.ring.v_full[ring.slot], ring.phase);
  tile::mbarrier_arrive(&shared.ring.v_empty[ring.slot]);
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
      words[j] = cuda::tile::pack2<typename C::Type>(o[4 * j + 2 * i] * inverse,
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
