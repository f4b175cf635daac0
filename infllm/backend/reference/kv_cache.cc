// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/pages.h"
#include "infllm/backend/reference/rounding.h"
#include "infllm/backend/reference/rows.h"

namespace infllm::reference {

std::int64_t kv_page_bytes(const KvLayout& layout) {
  const KvPages pages{.layout = layout};
  const Batch none;
  return Pages(pages, none).bytes();
}

Status kv_append(const Backend& backend, const KvAppendParams& p, Workspace) {
  const Pages pages(p.pages, p.batch);
  const KvLayout& layout = p.pages.layout;
  const std::int64_t dim = layout.head_dim;
  backend.pool->parallel_for(p.batch.num_tokens, [&](std::int64_t token, int) {
    const auto [sequence, position] = place_of(p.batch, token);
    for (std::int32_t head = 0; head < layout.kv_heads; ++head) {
      const std::int64_t from = (token * layout.kv_heads + head) * dim;
      const auto store = [&](const void* source, double* row) {
        const double* values = static_cast<const double*>(source) + from;
        for (std::int64_t d = 0; d < dim; ++d) row[d] = round_to(layout.dtype, values[d]);
      };
      store(p.k, pages.key(sequence, head, position));
      store(p.v, pages.value(sequence, head, position));
      if (layout.score_keys()) store(p.k_score, pages.score_key(sequence, head, position));
    }
  });
  return {};
}

Status kv_read(const Backend&, const KvReadParams& p, Workspace) {
  const Pages pages(p.pages, p.batch);
  const KvLayout& layout = p.pages.layout;
  const std::int64_t dim = layout.head_dim;
  // Copies `count` rows per head of one sequence to out [count, Hkv, D], and moves out behind them.
  const auto copy = [&](void*& out, std::int64_t count, auto&& row_of) {
    if (out == nullptr) return;
    auto* to = static_cast<double*>(out);
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int32_t head = 0; head < layout.kv_heads; ++head) {
        to = std::copy_n(row_of(head, i), dim, to);
      }
    }
    out = to;
  };
  void* k = p.k;
  void* v = p.v;
  void* fine = p.fine;
  void* coarse = p.coarse;
  for (std::int32_t s = 0; s < p.batch.num_sequences; ++s) {
    const std::int64_t length = p.batch.kv_length[s];
    copy(k, length, [&](auto head, auto i) { return pages.key(s, head, i); });
    copy(v, length, [&](auto head, auto i) { return pages.value(s, head, i); });
    copy(fine, layout.config.fine_windows(length),
         [&](auto head, auto j) { return pages.fine(s, head, j); });
    copy(coarse, layout.config.coarse_windows(length),
         [&](auto head, auto m) { return pages.coarse(s, head, m); });
  }
  return {};
}

}  // namespace infllm::reference
