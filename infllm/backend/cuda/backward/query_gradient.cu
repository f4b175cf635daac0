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
#include "infllm/backend/cuda/sm80/row_tile.cuh"

namespace infllm::cuda::backward {
namespace {

using sm80::kWarpRows;
using sm80::TokenTile;
using sm80::Visit;

constexpr int kHalfKeys = kPageTokens / 2;

// Thread blocks on a multiprocessor: what shared memory (D = 128) lets be there together.
constexpr int resident(int warps) { return warps == sm80::kDenseWarps ? 2 : 3; }

template <int D, int kWarps>
struct Shared {
  std::byte q[kWarps * kWarpRows * 2 * D];
  std::byte grad_o[kWarps * kWarpRows * 2 * D];
  std::byte k[kPageTokens * 2 * D];
  std::byte v[kPageTokens * 2 * D];
};

template <typename T, int D, int kWarps>
class QueryGradient : sm80::RowTile<T, D, kWarps, BackwardArgs> {
 public:
  __device__ QueryGradient(const BackwardArgs& args, Shared<D, kWarps>& shared,
                           const TokenTile& tile, int slot)
      : Base(args, tile, slot), shared_(shared) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stats_[i] = a_.stats[this->packed_row(min(this->row(i), rows_ - 1))];
    }
    sm80::clear(grad_q_);
  }

  __device__ void run() {
    this->load_rows(shared_.q, static_cast<const T*>(a_.q));
    this->load_rows(shared_.grad_o, static_cast<const T*>(a_.grad_o));
    tile::cp_async_commit();  // even if no block follows, whose copies would take them along
    Visit next = {};
    if (count_ > 0) next = this->look_up(0);
    for (int j = 0; j < count_; ++j) {
      const Visit at = next;
      __syncthreads();  // everybody is done with the block before
      this->load_plane(shared_.k, at, a_.pool.map.key(head_));
      this->load_plane(shared_.v, at, a_.pool.map.value(head_));
      tile::cp_async_commit();
      if (j + 1 < count_) next = this->look_up(j + 1);
      tile::cp_async_wait<0>();
      __syncthreads();
      if (!this->wants(at)) continue;
      add_half<0>(at);
      add_half<1>(at);
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // the rows have arrived even if there was no block
    const float factors[4] = {a_.scale, a_.scale, a_.scale, a_.scale};
    this->store_rows(shared_.q, grad_q_, factors, static_cast<T*>(a_.grad_q));
  }

 private:
  using Base = sm80::RowTile<T, D, kWarps, BackwardArgs>;
  using Base::a_, Base::count_, Base::head_, Base::lane_, Base::rows_, Base::warp_;

  template <int kHalf>
  __device__ void add_half(const Visit& at) {
    constexpr int kFirst = kHalf * kHalfKeys;
    float s[2][4][4];
    float grad_p[2][4][4];
    const int row = warp_ * kWarpRows;
    sm80::multiply_transposed<T, D>(s, shared_.q, row, shared_.k, kFirst, lane_);
    sm80::multiply_transposed<T, D>(grad_p, shared_.grad_o, row, shared_.v, kFirst, lane_);
    this->mask(s, at, at.block * kPageTokens + kFirst);
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

  Shared<D, kWarps>& shared_;
  RowStatistics stats_[4];
  float grad_q_[2][D / 8][4];
};

template <typename T, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, resident(kWarps))
    query_gradient_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared<D, kWarps>*>(memory);
  sm80::with_row_tile(args, [&](const TokenTile& tile, int slot) {
    QueryGradient<T, D, kWarps>(args, shared, tile, slot).run();
  });
}

}  // namespace

int tile_tokens(const AttendParams& params) { return sm80::row_tile_tokens(params); }

Status query_gradient(const Backend& backend, const AttendParams& forward,
                      const BackwardArgs& args) {
  const Device& device = device_of(backend);
  return sm80::with_row_shape(forward, [&]<typename T, int D, int kWarps>() {
    return sm80::launch_row_tiles<sizeof(Shared<D, kWarps>), kWarps>(
        "attend_backward", query_gradient_kernel<T, D, kWarps>, args, device.stream);
  });
}

}  // namespace infllm::cuda::backward
