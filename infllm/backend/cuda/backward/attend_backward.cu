// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/backward/attend_backward.h"
#include "infllm/backend/cuda/backward/passes.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/powers.cuh"
#include "infllm/backend/cuda/shapes.cuh"

namespace infllm::cuda::backward {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxGroup = 128;

struct StatisticsArgs {
  const void* o;
  const void* grad_o;
  const float* lse;
  const float* grad_lse;
  RowStatistics* stats;
  std::int64_t tokens;
  int heads;
};

// D / 8 neighbouring threads a row, rows in the order of memory.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) statistics_kernel(StatisticsArgs a) {
  constexpr int kRowThreads = D / kVector;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t row = thread / kRowThreads;
  const bool is_row = row < a.tokens * a.heads;
  float sum = 0;
  if (is_row) {
    float o[kVector], grad_o[kVector];
    load(static_cast<const T*>(a.o) + thread * kVector, o);
    load(static_cast<const T*>(a.grad_o) + thread * kVector, grad_o);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(o[i], grad_o[i], sum);
  }
#pragma unroll
  for (int step = kRowThreads / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, step);
  }
  if (!is_row || thread % kRowThreads != 0) return;
  const std::int64_t stat = row % a.heads * a.tokens + row / a.heads;
  const float lse = a.lse[stat];
  if (a.grad_lse != nullptr) sum -= a.grad_lse[stat];
  a.stats[row] = {lse == -INFINITY ? INFINITY : lse * kLog2E, sum};
}

// Without what lies in a workspace.
BackwardArgs backward_args(const AttendBackwardParams& params) {
  const AttendParams& forward = params.forward;
  return {.pool = PagePool(forward.pages),
          .batch = forward.batch,
          .q = forward.q,
          .grad_o = params.grad_o,
          .stats = nullptr,
          .grad_q = params.grad_q,
          .grad_k = params.grad_k,
          .grad_v = params.grad_v,
          .part_sums = nullptr,
          .lists = {},
          .choosers = choosers(forward),
          .heads_q = forward.heads_q,
          .group = forward.heads_q / forward.pages.layout.kv_heads,
          .tile_tokens = tile_tokens(forward),
          .scale = forward.scale,
          .c = exponent_of(forward.scale)};
}

}  // namespace

Status take_statistics(const Backend& backend, const AttendBackwardParams& p,
                       RowStatistics* stats) {
  const AttendParams& f = p.forward;
  const StatisticsArgs args{.o = f.o,
                            .grad_o = p.grad_o,
                            .lse = static_cast<const float*>(f.lse),
                            .grad_lse = static_cast<const float*>(p.grad_lse),
                            .stats = stats,
                            .tokens = f.batch.num_tokens,
                            .heads = f.heads_q};
  const cudaStream_t stream = device_of(backend).stream;
  with_shape(f.pages.layout, [&]<typename T, int D>() {
    const auto blocks = static_cast<unsigned>(
        ceil_div(args.tokens * args.heads * (D / kVector), std::int64_t{kThreads}));
    statistics_kernel<T, D><<<blocks, kThreads, 0, stream>>>(args);
  });
  return launched("attend_backward");
}

Status query_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  BackwardArgs args = backward_args(params);
  args.stats = stats;
  Arena arena(workspace);
  if (is_sparse(forward)) {
    args.lists = INFLLM_TRY(sm80::build_union_lists(backend, forward, args.tile_tokens, arena));
  }
  return query_gradient(backend, forward, args);
}

std::size_t query_gradient_bytes(const AttendBackwardParams& params) {
  const AttendParams& forward = params.forward;
  return is_sparse(forward) ? sm80::union_bytes(forward, tile_tokens(forward)) : 0;
}

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  const KvLayout& layout = forward.pages.layout;
  INFLLM_TRY(check_heads("attend_backward", layout, forward.heads_q, kMaxGroup));
  if (forward.batch.max_kv_length == 0) return {};
  Arena arena(workspace);
  BackwardArgs args = backward_args(params);
  take(forward, args.choosers,
       [&]<typename T>(T*& pointer, std::int64_t count) { pointer = arena.take<T>(count); });
  args.part_sums = arena.take<float>(part_floats(forward, args.choosers));
  const std::int64_t rows = std::int64_t{forward.batch.num_tokens} * forward.heads_q;
  auto* stats = arena.take<RowStatistics>(rows);
  args.stats = stats;
  if (rows > 0) {
    INFLLM_TRY(take_statistics(backend, params, stats));
    INFLLM_TRY(query_gradient(backend, params, stats, arena.rest()));
  }
  INFLLM_TRY(build_choosers(backend, forward, args.choosers));
  return key_gradient(backend, forward, args);
}

std::size_t attend_backward_bytes(const Backend&, const AttendBackwardParams& params) {
  const AttendParams& forward = params.forward;
  Choosers c = choosers(forward);
  ArenaSize size;
  take(forward, c, [&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); });
  size.take<float>(part_floats(forward, c));
  size.take<RowStatistics>(std::int64_t{forward.batch.num_tokens} * forward.heads_q);
  size.add(query_gradient_bytes(params));
  return size.bytes();
}

}  // namespace infllm::cuda::backward
