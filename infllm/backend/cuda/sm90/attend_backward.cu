// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_backward.h"
#include "infllm/backend/cuda/sm90/attend_backward_passes.h"
#include "infllm/backend/cuda/sm90/attend_shapes.h"

namespace infllm::cuda::sm90 {
namespace {

std::int64_t rows_of(const AttendBackwardParams& params) {
  return std::int64_t{params.forward.batch.num_tokens} * params.forward.heads_q;
}

// Tiles of the dQ pass would be of more tokens than a set of tokens has bits.
bool takes_general_queries(const AttendParams& forward) {
  return is_sparse(forward) && forward.heads_q < 4 * forward.pages.layout.kv_heads;
}

bool takes_one_pass(const AttendParams& forward) {
  return !is_sparse(forward) && suits_dense_gradient(forward);
}

}  // namespace

bool attends_backward(const AttendBackwardParams& params) {
  const AttendParams& forward = params.forward;
  if (forward.batch.num_tokens == 0) return false;  // a tensor map cannot be empty
  return covers(forward, 2, is_sparse(forward) ? 32 : 64);
}

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace) {
  if (params.forward.batch.max_kv_length == 0) return {};
  Arena arena(workspace);
  const std::int64_t rows = rows_of(params);
  auto* stats = arena.take<RowStatistics>(rows);
  const std::span<std::byte> rest = arena.rest();
  if (rows > 0) INFLLM_TRY(backward::take_statistics(backend, params, stats));
  if (takes_one_pass(params.forward)) return dense_gradient(backend, params, stats, rest);
  if (rows > 0) {
    INFLLM_TRY(takes_general_queries(params.forward)
                   ? backward::query_gradient(backend, params, stats, rest)
                   : sm90::query_gradient(backend, params, stats, rest));
  }
  return key_gradient(backend, params, stats, rest);
}

std::size_t attend_backward_bytes(const Backend&, const AttendBackwardParams& params) {
  ArenaSize size;
  size.take<RowStatistics>(rows_of(params));
  size.add(takes_one_pass(params.forward) ? dense_gradient_bytes(params)
                                          : std::max(takes_general_queries(params.forward)
                                                         ? backward::query_gradient_bytes(params)
                                                         : sm90::query_gradient_bytes(params),
                                                     key_gradient_bytes(params)));
  return size.bytes();
}

}  // namespace infllm::cuda::sm90
