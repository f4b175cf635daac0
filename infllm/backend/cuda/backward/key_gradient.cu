// SPDX-License-Identifier: Apache-2.0
//
// dK and dV of a block of 64 keys, 16 keys a warp. A thread block walks the tokens that chose the
// block (choosers.h), 64 rows (token, head of the group) at a time:
//
//   S^T = K Q^T   dP^T = V dO^T   ->   P^T, dS^T   ->   dV += P^T dO,  dK += dS^T Q
//
// The products are turned round, so that the first ones' results are, packed to 16 bits, the left
// operands of the last ones. K and V stay in shared memory, stages of Q and dO are loaded one
// ahead by cp.async, and where a stage's rows lie is looked up one stage before that. Nothing is
// computed for tokens that did not choose the block; only the block's own tokens, which are the
// first ones of its list, need a mask.
//
// A cut list's parts write float sums, which reduce_kernel adds up in their order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "infllm/backend/cuda/backward/keys.cuh"
#include "infllm/backend/cuda/backward/passes.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm80/warp_products.cuh"

namespace infllm::cuda::backward {
namespace {

using sm80::SmemTile;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 64;  // of a stage
constexpr int kResident = 2;
constexpr int kReduceThreads = 256;

// Where a stage's rows lie, and what their weights need.
struct StageRows {
  std::int32_t row[kRows];   // in [T, Hq], -1: none
  std::int32_t keys[kRows];  // visible ones of the block
  float lse[kRows];
  float delta[kRows];
};

template <int D>
struct Shared {
  std::byte k[kPageTokens * 2 * D];
  std::byte v[kPageTokens * 2 * D];
  std::byte q[2][kRows * 2 * D];
  std::byte grad_o[2][kRows * 2 * D];
  StageRows rows[3];
};

// A block and who chose it.
struct Target {
  __device__ Target(const BackwardArgs& a, std::int64_t index)
      : chosen(a.choosers.blocks[index]), place(a.choosers, a.batch, index) {}

  const ChosenBlock chosen;
  const BlockPlace place;
};

template <typename T, int D>
class KeyGradient {
 public:
  using Smem = SmemTile<D>;

  __device__ KeyGradient(const BackwardArgs& args, Shared<D>& shared, const Target& target,
                         int part)
      : a_(args),
        shared_(shared),
        target_(target),
        sequence_(args.batch, target.place.sequence),
        warp_(tile::warp_index()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        part_(part),
        page_(sequence_.page(target.place.block, args.pool.num_pages)),
        listed_(args.choosers.tokens != nullptr && sequence_.sparse) {
    const int first = part < 0 ? 0 : part * a_.choosers.part_tokens;
    const int count =
        part < 0 ? target.chosen.count : min(a_.choosers.part_tokens, target.chosen.count - first);
    first_ = first;
    rows_ = page_ < 0 ? 0 : std::int64_t{count} * a_.group;
    sm80::clear(grad_k_);
    sm80::clear(grad_v_);
  }

  __device__ void run() {
    const int stages = static_cast<int>((rows_ + kRows - 1) / kRows);
    if (stages > 0) {
      const int keys = sequence_.length - target_.place.block * kPageTokens;
      load_plane(shared_.k, a_.pool.map.key(target_.place.head), keys);
      load_plane(shared_.v, a_.pool.map.value(target_.place.head), keys);
      look_up(0);
      __syncthreads();
      load_stage(0);
      look_up(1);
    }
    for (int j = 0; j < stages; ++j) {
      tile::cp_async_wait<0>();
      __syncthreads();  // stage j has arrived, stage j - 1 is done with, rows j + 1 are known
      if (j + 1 < stages) load_stage(j + 1);
      look_up(j + 2);
      add_stage(j);
    }
    if (part_ < 0) {
      write();
    } else {
      write_part();
    }
  }

 private:
  __device__ void load_plane(std::byte* to, std::int64_t offset, int keys) {
    Smem::template load<kPageTokens, kThreads>(to, a_.pool.plane<const std::byte>(page_, offset),
                                               keys);
  }

  // The first threads find the rows of a stage.
  __device__ void look_up(int stage) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kRows) return;
    StageRows& rows = shared_.rows[stage % 3];
    const std::int64_t r = std::int64_t{stage} * kRows + i;
    if (r >= rows_) {
      rows.row[i] = -1;
      rows.keys[i] = kPageTokens;
      rows.lse[i] = INFINITY;  // weights of zero
      rows.delta[i] = 0;
      return;
    }
    const auto at = static_cast<int>(r / a_.group);
    const int first_key = target_.place.block * kPageTokens;
    const int token = listed_ ? a_.choosers.tokens[target_.chosen.start + first_ + at]
                              : sequence_.first_token +
                                    max(0, first_key - sequence_.first_position()) + first_ + at;
    const int position = sequence_.first_position() + token - sequence_.first_token;
    const int row = token * a_.heads_q + target_.place.head * a_.group +
                    static_cast<int>(r - std::int64_t{at} * a_.group);
    const RowStatistics stats = a_.stats[row];
    rows.row[i] = row;
    rows.keys[i] = min(kPageTokens, position - first_key + 1);
    rows.lse[i] = stats.lse;
    rows.delta[i] = stats.delta;
  }

  __device__ void load_stage(int stage) {
    const StageRows& rows = shared_.rows[stage % 3];
    constexpr int kStep = kThreads / Smem::kPieces;
    const int piece = static_cast<int>(threadIdx.x) % Smem::kPieces;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      const int r = i + static_cast<int>(threadIdx.x) / Smem::kPieces;
      const int row = rows.row[r];
      const std::int64_t from = std::int64_t{max(row, 0)} * D + piece * 8;
      const int to = Smem::offset(r, piece);
      tile::cp_async_16(shared_.q[stage % 2] + to, static_cast<const T*>(a_.q) + from, row >= 0);
      tile::cp_async_16(shared_.grad_o[stage % 2] + to, static_cast<const T*>(a_.grad_o) + from,
                        row >= 0);
    }
    tile::cp_async_commit();
  }

  __device__ void add_stage(int stage) {
    const StageRows& rows = shared_.rows[stage % 3];
    const std::byte* q = shared_.q[stage % 2];
    const std::byte* grad_o = shared_.grad_o[stage % 2];
    float p[1][8][4];
    float grad_x[1][8][4];
    sm80::multiply_transposed<T, D>(p, shared_.k, warp_ * 16, q, 0, lane_);
    sm80::multiply_transposed<T, D>(grad_x, shared_.v, warp_ * 16, grad_o, 0, lane_);
    const bool masked = rows.keys[0] < kPageTokens;  // lists ascend
    const int key = warp_ * 16 + (lane_ >> 2);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = n * 8 + (lane_ & 3) * 2 + e % 2;
        if (masked && key + e / 2 * 8 >= rows.keys[row]) p[0][n][e] = -INFINITY;
        p[0][n][e] = tile::fast_exp2(fmaf(p[0][n][e], a_.c, -rows.lse[row]));
        grad_x[0][n][e] = p[0][n][e] * (grad_x[0][n][e] - rows.delta[row]);
      }
    }
    sm80::multiply_add<T, D>(grad_v_, p, grad_o, 0, lane_);
    sm80::multiply_add<T, D>(grad_k_, grad_x, q, 0, lane_);
  }

  __device__ void write() {
    const int first_key = target_.place.block * kPageTokens;
    const std::int64_t base = keys_before(a_.batch, target_.place.sequence, lane_) + first_key;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = warp_ * 16 + half * 8 + (lane_ >> 2);
      if (first_key + key >= sequence_.length) continue;
      const std::int64_t at =
          ((base + key) * a_.pool.map.heads + target_.place.head) * D + (lane_ & 3) * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(static_cast<T*>(a_.grad_k) + at + n * 8) = tile::pack2<T>(
            grad_k_[0][n][half * 2] * a_.scale, grad_k_[0][n][half * 2 + 1] * a_.scale);
        *reinterpret_cast<std::uint32_t*>(static_cast<T*>(a_.grad_v) + at + n * 8) =
            tile::pack2<T>(grad_v_[0][n][half * 2], grad_v_[0][n][half * 2 + 1]);
      }
    }
  }

  __device__ void write_part() {
    float* sums =
        a_.part_sums + std::int64_t{target_.chosen.first_part + part_} * (2 * kPageTokens * D);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* at = sums + (warp_ * 16 + half * 8 + (lane_ >> 2)) * D + (lane_ & 3) * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(at + n * 8) = {grad_k_[0][n][half * 2],
                                                  grad_k_[0][n][half * 2 + 1]};
        *reinterpret_cast<float2*>(at + kPageTokens * D + n * 8) = {grad_v_[0][n][half * 2],
                                                                    grad_v_[0][n][half * 2 + 1]};
      }
    }
  }

  const BackwardArgs& a_;
  Shared<D>& shared_;
  const Target& target_;
  const Sequence sequence_;
  const int warp_;
  const int lane_;
  const int part_;  // -1: the whole list
  const int page_;
  const bool listed_;
  int first_;  // token of the list
  std::int64_t rows_;
  float grad_k_[1][D / 8][4];
  float grad_v_[1][D / 8][4];
};

// Block x: first the parts of cut blocks, which are long, then the other blocks.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, kResident)
    key_gradient_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  std::int64_t block = static_cast<std::int64_t>(blockIdx.x) - args.choosers.part_capacity;
  int part = -1;
  if (block < 0) {
    const Part& item = args.choosers.parts[blockIdx.x];
    block = item.block;
    part = item.part;
    if (block < 0) return;
  }
  const Target target(args, block);
  if (part < 0 && target.chosen.first_part >= 0) return;
  if (target.place.block * kPageTokens >= args.batch.kv_length[target.place.sequence]) return;
  auto& shared = *reinterpret_cast<Shared<D>*>(memory);
  KeyGradient<T, D>(args, shared, target, part).run();
}

// Adds up the parts of block x.
template <typename T, int D>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ BackwardArgs args) {
  const Target target(args, blockIdx.x);
  if (target.chosen.first_part < 0) return;
  const int parts =
      (target.chosen.count + args.choosers.part_tokens - 1) / args.choosers.part_tokens;
  const int first_key = target.place.block * kPageTokens;
  const int keys = min(kPageTokens, args.batch.kv_length[target.place.sequence] - first_key);
  const std::int64_t base =
      keys_before(args.batch, target.place.sequence, static_cast<int>(threadIdx.x) % 32) +
      first_key;
  const float* sums =
      args.part_sums + std::int64_t{target.chosen.first_part} * (2 * kPageTokens * D);
  for (int i = static_cast<int>(threadIdx.x); i < keys * D; i += kReduceThreads) {
    float grad_k = 0;
    float grad_v = 0;
    for (int p = 0; p < parts; ++p) {
      grad_k += sums[p * (2 * kPageTokens * D) + i];
      grad_v += sums[p * (2 * kPageTokens * D) + kPageTokens * D + i];
    }
    const std::int64_t at = ((base + i / D) * args.pool.map.heads + target.place.head) * D + i % D;
    static_cast<T*>(args.grad_k)[at] = to<T>(grad_k * args.scale);
    static_cast<T*>(args.grad_v)[at] = to<T>(grad_v);
  }
}

template <typename T, int D>
Status launch(const Device& device, const BackwardArgs& args) {
  const auto blocks = static_cast<unsigned>(args.choosers.num_blocks);
  const auto parts = static_cast<unsigned>(args.choosers.part_capacity);
  INFLLM_TRY(start("attend_backward", key_gradient_kernel<T, D>, parts + blocks, kThreads,
                   sizeof(Shared<D>), device.stream, args));
  return start("attend_backward", reduce_kernel<T, D>, blocks, kReduceThreads, 0, device.stream,
               args);
}

}  // namespace

Status key_gradient(const Backend& backend, const AttendParams& forward, const BackwardArgs& args) {
  const Device& device = device_of(backend);
  return with_shape(forward.pages.layout,
                    [&]<typename T, int D>() { return launch<T, D>(device, args); });
}

}  // namespace infllm::cuda::backward
