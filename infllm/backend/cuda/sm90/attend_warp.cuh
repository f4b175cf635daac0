// SPDX-License-Identifier: Apache-2.0
//
// The products of one warp by itself (mma.sync): 16 rows, which with G = 16 are one token, against
// one block in shared memory. A wgmma would multiply the 48 rows of the warpgroup's other tokens
// too. Accumulators lie as wgmma's do.
#pragma once

#include "infllm/backend/cuda/sm90/attend_config.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::sm90 {

template <typename T, int kCount>
__device__ __forceinline__ void multiply_add(float (&d)[kCount], int first,
                                             const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  float part[4] = {d[first], d[first + 1], d[first + 2], d[first + 3]};
  tile::mma_m16n8k16<T>(part, a, {b0, b1});
#pragma unroll
  for (int i = 0; i < 4; ++i) d[first + i] = part[i];
}

// s = q k^T of the 16 rows that begin at `first_row` of q.
template <class C>
__device__ __forceinline__ void warp_products(float (&s)[32], const std::byte* q, int first_row,
                                              const std::byte* k) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] = 0;
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
    const int panel = step / 4 * kPanelBytes;
    std::uint32_t a[4];
    tile::ldmatrix_x4(a, q + panel + swizzled(first_row + lane % 16, step % 4 * 2 + lane / 16));
#pragma unroll
    for (int keys = 0; keys < 64; keys += 16) {
      std::uint32_t b[4];
      tile::ldmatrix_x4(
          b, k + panel + swizzled(keys + lane / 16 * 8 + lane % 8, step % 4 * 2 + lane / 8 % 2));
      multiply_add<typename C::Type>(s, keys / 2, a, b[0], b[1]);
      multiply_add<typename C::Type>(s, keys / 2 + 4, a, b[2], b[3]);
    }
  }
}

// o += p v.
template <class C>
__device__ __forceinline__ void warp_sum(float (&o)[C::kDim / 2], const std::uint32_t (&p)[16],
                                         const std::byte* v) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int keys = 0; keys < 64; keys += 16) {
    const std::uint32_t a[4] = {p[keys / 4], p[keys / 4 + 1], p[keys / 4 + 2], p[keys / 4 + 3]};
#pragma unroll
    for (int dims = 0; dims < C::kDim; dims += 16) {
      std::uint32_t b[4];
      tile::ldmatrix_x4_trans(
          b, v + dims / 64 * kPanelBytes + swizzled(keys + lane % 16, dims % 64 / 8 + lane / 16));
      multiply_add<typename C::Type>(o, dims / 2, a, b[0], b[1]);
      multiply_add<typename C::Type>(o, dims / 2 + 4, a, b[2], b[3]);
    }
  }
}

}  // namespace infllm::cuda::sm90
