// SPDX-License-Identifier: Apache-2.0
//
// One warp's share of the attention of a row: 16 heads against slices of 16 tokens, with a running
// soft-max. A lane holds, of rows (heads) lane / 4 and lane / 4 + 8, what mma.cuh says.
#pragma once

#include "infllm/backend/cuda/decode/kv_ring.cuh"

namespace infllm::cuda::decode {

template <typename T, int kDim>
class WarpAttention {
 public:
  // Rows are 16 bytes at a time at Ring::at(row, piece).
  // q: 16 heads; those that do not exist are zero.
  template <typename Ring>
  __device__ __forceinline__ void load_queries(const T* q) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      tile::ldmatrix_x4(q_[k], q + Ring::at(lane % 16, 2 * k + lane / 16));
    }
  }

  template <typename Ring>
  __device__ __forceinline__ void start(const T* q, float scale) {
    load_queries<Ring>(q);
    scale_ = scale;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[i][j] = 0;
    }
  }

  // Products of the heads with rows 0 .. 7 and 8 .. 15 of sixteen keys: x[i][2 r + j] is of head
  // lane / 4 + 8 r and row 8 i + 2 (lane % 4) + j.
  template <typename Ring>
  __device__ __forceinline__ void logits(const T* rows, float (&x)[2][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] = 0;
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      std::uint32_t keys[4];  // rows 0 .. 7: both halves of the 16 elements; then rows 8 .. 15
      tile::ldmatrix_x4(keys, rows + Ring::at(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      tile::mma_m16n8k16<T>(x[0], q_[k], {keys[0], keys[1]});
      tile::mma_m16n8k16<T>(x[1], q_[k], {keys[2], keys[3]});
    }
  }

  // Adds 16 tokens, of which `count` > 0 exist.
  template <typename Ring>
  __device__ __forceinline__ void add(const T* keys, const T* values_of, int count) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float x[2][4];
    logits<Ring>(keys, x);
    std::uint32_t weights[4];
    soften(x, count, weights);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      std::uint32_t values[4];  // columns 0 .. 7: tokens 0 .. 7, 8 .. 15; then columns 8 .. 15
      tile::ldmatrix_x4_trans(values, values_of + Ring::at(lane % 16, 2 * i + lane / 16));
      tile::mma_m16n8k16<T>(o_[2 * i], weights, {values[0], values[1]});
      tile::mma_m16n8k16<T>(o_[2 * i + 1], weights, {values[2], values[3]});
    }
  }

  // Unnormalised outputs [16][stride], and of each head the maximum (in powers of 2) and the sum.
  __device__ __forceinline__ void finish(float* o, int stride, float* top, float* sum) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = lane / 4 + 8 * r;
      sum_[r] += __shfl_xor_sync(kAllLanes, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(kAllLanes, sum_[r], 2);
      if (lane % 4 == 0) {
        top[head] = top_[r];
        sum[head] = sum_[r];
      }
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        *reinterpret_cast<float2*>(o + head * stride + 8 * i + lane % 4 * 2) = {o_[i][2 * r],
                                                                                o_[i][2 * r + 1]};
      }
    }
  }

 private:
  // From logits to weights 2^(x - top), packed as the left operand of the next product.
  __device__ __forceinline__ void soften(float (&x)[2][4], int count, std::uint32_t (&weights)[4]) {
    const int pair = static_cast<int>(threadIdx.x) % 4;
    float top[2] = {top_[0], top_[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = 8 * i + 2 * pair + j % 2;
        x[i][j] = token < count ? x[i][j] * scale_ : -__builtin_huge_valf();
        top[j / 2] = fmaxf(top[j / 2], x[i][j]);
      }
    }
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
      grew |= top[r] > top_[r];
    }
    if (__any_sync(kAllLanes, grew)) rescale(top);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[i][j] = tile::fast_exp2(x[i][j] - top_[j / 2]);
        sum_[j / 2] += x[i][j];
      }
      weights[2 * i] = tile::pack2<T>(x[i][0], x[i][1]);
      weights[2 * i + 1] = tile::pack2<T>(x[i][2], x[i][3]);
    }
  }

  __device__ __forceinline__ void rescale(const float (&top)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = tile::fast_exp2(top_[r] - top[r]);
      top_[r] = top[r];
      sum_[r] *= factor;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        o_[i][2 * r] *= factor;
        o_[i][2 * r + 1] *= factor;
      }
    }
  }

  std::uint32_t q_[kDim / 16][4];
  float o_[kDim / 8][4];
  float top_[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()};
  float sum_[2] = {};  // this lane's columns only, until finish()
  float scale_;
};

}  // namespace infllm::cuda::decode
