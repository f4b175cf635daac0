// SPDX-License-Identifier: Apache-2.0
//
// Attention of one thread block to slices of 16 tokens, one for each warp at a time. Warps share
// the soft-max's maximum and their weights: each multiplies everybody's weights with its share of
// the columns of everybody's values, so that their outputs need not be merged.
//
// Keys come straight into registers (direct_tile.cuh), values by cp.async into shared memory, where
// piece i of token t lies at i ^ (t % 8) as in kv_ring.cuh. Both are asked for one round ahead.
#pragma once

#include "infllm/backend/cuda/decode/direct_tile.cuh"
#include "infllm/backend/cuda/decode/kv_ring.cuh"

namespace infllm::cuda::decode {

template <typename T, int kDim, int kWarps>
class PartAttention {
 public:
  struct Shared {
    alignas(128) T values[2][kWarps][kSliceTokens * kDim];
    uint4 weights[kWarps][32];
    alignas(16) float tops[kRowHeads][kWarps];
    alignas(16) float sums[kRowHeads][kWarps];
  };
  static constexpr int kTiles = kDim / (8 * kWarps);  // of eight columns, of a warp
  static_assert(kTiles * 8 * kWarps == kDim && kWarps == 8);

  __device__ __forceinline__ PartAttention(Shared& shared, float scale)
      : shared_(shared),
        scale_(scale),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Asks for this warp's slice of the next round, `tokens` of them at `keys` and `values`. With 0
  // tokens `values` need only be some address.
  __device__ __forceinline__ void fetch(const T* keys, const T* values, int tokens) {
    tokens_ = tokens;
    if (tokens > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        keys_[i].load(keys + min(kTileRows * i + lane_ / 4, tokens - 1) * kDim);
      }
    }
    constexpr int kPieces = kDim / kPieceElements;
    constexpr int kRows = 32 / kPieces;  // that the warp fetches at a time
    const int first = lane_ / kPieces;
    const int piece = lane_ % kPieces;
    const int swizzled = piece ^ first;
    T* const to = shared_.values[fetched_ % 2][warp_] + first * kDim;
    const T* const from = values + first * kDim + piece * kPieceElements;
#pragma unroll
    for (int j = 0; j < kSliceTokens / kRows; ++j) {
      const int row = kRows * j;  // and `first` more
      tile::cp_async_16(to + row * kDim + (swizzled ^ row % 8) * kPieceElements, from + row * kDim,
                        row + first < tokens);
    }
    tile::cp_async_commit();
    ++fetched_;
  }

  // Attends to what was fetched, `slices` of the first warps; by all warps. In between
  // fetch_next() asks for the round after it, or commits nothing.
  template <typename FetchNext>
  __device__ __forceinline__ void attend(const HeadQueries<T, kDim>& q, int slices,
                                         const FetchNext& fetch_next) {
    float x[2][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      keys_[0].add_products(q, i, x[0]);
      keys_[1].add_products(q, i, x[1]);
    }
    const int round = used_++;
    float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = 8 * i + 2 * (lane_ % 4) + j % 2;
        x[i][j] = token < tokens_ ? x[i][j] * scale_ : -kInfinity;
        top[j / 2] = fmaxf(top[j / 2], x[i][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
      if (lane_ % 4 == 0) shared_.tops[lane_ / 4 + 8 * r][warp_] = top[r];
    }
    __syncthreads();  // nobody reads the values of the round before any more
    fetch_next();
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto tops = reinterpret_cast<const float4*>(shared_.tops[lane_ / 4 + 8 * r]);
      const float4 a = tops[0];
      const float4 b = tops[1];
      const float largest = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)),
                                  fmaxf(fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)), top_[r]));
      base_[r] = largest == -kInfinity ? 0 : largest;
      factor[r] = tile::fast_exp2(top_[r] - base_[r]);
      top_[r] = largest;
      sum_[r] *= factor[r];
    }
    std::uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[i][j] = tile::fast_exp2(x[i][j] - base_[j / 2]);
        sum_[j / 2] += x[i][j];
      }
      weights[2 * i] = tile::pack2<T>(x[i][0], x[i][1]);
      weights[2 * i + 1] = tile::pack2<T>(x[i][2], x[i][3]);
    }
    shared_.weights[warp_][lane_] = make_uint4(weights[0], weights[1], weights[2], weights[3]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r] + __shfl_xor_sync(kAllLanes, sum_[r], 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane_ % 4 == 0) shared_.sums[lane_ / 4 + 8 * r][warp_] = sum;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[t][j] *= factor[j / 2];
    }
    tile::cp_async_wait<1>();
    __syncthreads();
    add_values(round % 2, slices);
  }

  // A head's share of the result over all slices that were attended to.
  __device__ __forceinline__ float top(int r) const { return top_[r]; }
  __device__ __forceinline__ float sum(int r) const {
    if (used_ == 0) return 0;
    const auto sums = reinterpret_cast<const float4*>(shared_.sums[lane_ / 4 + 8 * r]);
    const float4 a = sums[0];
    const float4 b = sums[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }
  // Columns 8 (kTiles warp + t) + 2 (lane % 4) + 0, 1 of head lane / 4 + 8 r.
  __device__ __forceinline__ float2 output(int t, int r) const {
    return {o_[t][2 * r], o_[t][2 * r + 1]};
  }

 private:
  __device__ __forceinline__ void add_values(int buffer, int slices) {
    float odd[kTiles][4] = {};  // two sums: each product waits for the one before
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w >= slices) continue;
      const uint4 weights = shared_.weights[w][lane_];
      const int token = lane_ % 16;
      const int piece = kTiles * warp_ + (kTiles == 2 ? lane_ / 16 : 0);
      std::uint32_t values[4];
      tile::ldmatrix_x4_trans(
          values, shared_.values[buffer][w] + token * kDim + (piece ^ token % 8) * kPieceElements);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        tile::mma_m16n8k16<T>(w % 2 == 0 ? o_[t] : odd[t],
                              {weights.x, weights.y, weights.z, weights.w},
                              {values[2 * t], values[2 * t + 1]});
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[t][j] += odd[t][j];
    }
  }

  Shared& shared_;
  const float scale_;
  const int warp_, lane_;
  int fetched_ = 0;  // rounds
  int used_ = 0;
  int tokens_ = 0;  // of this warp's slice
  DirectTile<T, kDim> keys_[2];
  float o_[kTiles][4] = {};
  float top_[2] = {-kInfinity, -kInfinity};
  float base_[2];
  float sum_[2] = {};  // of this lane's tokens
};

}  // namespace infllm::cuda::decode
