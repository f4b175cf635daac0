// SPDX-License-Identifier: Apache-2.0
//
// Products of a computing warpgroup's 64 rows with blocks of keys or values in shared memory.
// Nothing here waits for a product: that is wgmma_wait's.
#pragma once

#include "infllm/backend/cuda/sm90/attend_config.cuh"
#include "infllm/backend/cuda/tile/control.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::cuda::sm90 {

// The same value in all lanes, and the compiler knows: descriptors of wgmma are made in uniform
// registers then, instead of being moved there before every product.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

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
        tile::ldmatrix_x4(a[k], rows + k / 4 * kPanelBytes + swizzled(row, k % 4 * 2 + lane / 16));
      }
    }
  }

  // Starts s = q k^T of as many keys as s has columns, whose panels are of so many rows.
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&s)[kCount], const std::byte* keys) const {
    using Product = tile::Wgmma<typename C::Type, 2 * kCount, tile::Major::kK>;
    const std::uint64_t k_desc = tile::smem_desc_k_major(keys);
    tile::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const std::uint64_t at =
          k_desc + k / 4 * (kCount / 32 * kPanelBytes / 16) + k % 4 * tile::kStepKMajor;
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

// Numbers of an accumulator, rounded, as operand a of the next product.
template <typename T, int kCount>
__device__ __forceinline__ void pack(std::uint32_t (&words)[kCount / 2], const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = tile::pack2<T>(x[2 * i], x[2 * i + 1]);
}

// sum += p rows, of tiles of 64 rows one after another. The caller fences and commits. `rows` is
// their smem_desc_mn_major.
template <class C, int kWords>
__device__ __forceinline__ void add_product(float (&sum)[C::kDim / 2],
                                            const std::uint32_t (&p)[kWords], std::uint64_t rows) {
  using Sum = tile::Wgmma<typename C::Type, C::kDim, tile::Major::kMN>;
#pragma unroll
  for (int k = 0; k < kWords / 4; ++k) {
    Sum::rs(sum, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
            rows + k / 4 * (C::kTileBytes / 16) + k % 4 * tile::kStepMnMajor, 1);
  }
}

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

}  // namespace infllm::cuda::sm90
