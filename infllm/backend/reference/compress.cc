// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/pages.h"
#include "infllm/backend/reference/rounding.h"
#include "infllm/backend/reference/rows.h"

namespace infllm::reference {
namespace {

// out = mean(keys[first .. first + size - 1]), rounded once.
template <typename Real, typename KeyAt>
void pool_window(KeyAt&& key_at, std::int64_t first, std::int64_t size, std::int64_t dim,
                 DType dtype, double* out) {
  for (std::int64_t d = 0; d < dim; ++d) {
    Real sum = 0;
    for (std::int64_t i = 0; i < size; ++i) sum += static_cast<Real>(key_at(first + i)[d]);
    out[d] = round_to(dtype, static_cast<double>(sum / static_cast<Real>(size)));
  }
}

}  // namespace

Status compress(const Backend& backend, const CompressParams& p, Workspace) {
  const Pages pages(p.pages, p.batch);
  const KvLayout& layout = p.pages.layout;
  const SparseConfig& config = layout.config;
  const std::int64_t tasks = std::int64_t{p.batch.num_sequences} * layout.kv_heads;
  with_accumulator(rounding_of(backend), [&](auto zero) {
    using Real = decltype(zero);
    backend.pool->parallel_for(tasks, [&](std::int64_t task, int) {
      const auto s = static_cast<std::int32_t>(task / layout.kv_heads);
      const auto head = static_cast<std::int32_t>(task % layout.kv_heads);
      const std::int64_t length = p.batch.kv_length[s];
      const std::int64_t new_tokens = p.batch.query_start[s + 1] - p.batch.query_start[s];
      const std::int64_t from = p.from_length ? p.from_length[s] : length - new_tokens;
      const auto key_at = [&](std::int64_t t) { return pages.score_key(s, head, t); };
      // A window is new when it is complete within `length` keys but not within `from`.
      for (std::int64_t j = config.fine_windows(from); j < config.fine_windows(length); ++j) {
        pool_window<Real>(key_at, j * config.kernel_stride, config.kernel_size, layout.head_dim,
                          layout.dtype, pages.fine(s, head, j));
      }
      for (std::int64_t m = config.coarse_windows(from); m < config.coarse_windows(length); ++m) {
        pool_window<Real>(key_at, m * config.coarse_stride(), config.coarse_size(), layout.head_dim,
                          layout.dtype, pages.coarse(s, head, m));
      }
    });
  });
  return {};
}

}  // namespace infllm::reference
