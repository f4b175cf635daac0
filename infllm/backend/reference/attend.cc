// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/backend/reference/visible.h"
#include "infllm/core/arena.h"

namespace infllm::reference {

Status attend(const Backend& backend, const AttendParams& p, Workspace workspace) {
  const Rounding rounding = rounding_of(backend);
  const Pages pages(p.pages, p.batch);
  const std::int32_t groups = p.pages.layout.kv_heads;
  const std::int32_t heads = p.heads_q / groups;
  const std::int64_t dim = p.pages.layout.head_dim;
  const std::int64_t longest = p.batch.max_kv_length;
  with_accumulator(rounding, [&](auto zero) {
    using Real = decltype(zero);
    Arena arena(workspace);
    auto* positions = arena.take<std::int32_t>(longest * backend.pool->size());
    Real* weights = arena.take<Real>(longest * backend.pool->size());
    Real* sums = arena.take<Real>(dim * backend.pool->size());
    Real* queries = arena.take<Real>(dim * backend.pool->size());

    backend.pool->parallel_for(p.batch.num_tokens, [&](std::int64_t token, int worker) {
      const Place place = place_of(p.batch, token);
      std::int32_t* vis = positions + longest * worker;
      Real* x = weights + longest * worker;
      Real* acc = sums + dim * worker;
      Real* q = queries + dim * worker;
      for (std::int32_t g = 0; g < groups; ++g) {
        const std::int64_t count = visible_positions(p, place, token, g, vis);
        for (std::int32_t h = g * heads; h < (g + 1) * heads; ++h) {
          const std::int64_t row = (token * p.heads_q + h) * dim;
          round_row(static_cast<const double*>(p.q) + row, dim, rounding.operand, q);
          double* o = static_cast<double*>(p.o) + row;

          // x_t = scale q . K_t, then exp(x_t - M).
          for (std::int64_t i = 0; i < count; ++i) {
            const double* key = pages.key(place.sequence, g, vis[i]);
            x[i] = static_cast<Real>(p.scale) * dot<Real>(q, key, dim);
          }
          const Softmax<Real> s = exponentiate(x, count);
          // O = sum exp(x_t - M) V_t / Z.
          std::fill(acc, acc + dim, Real{0});
          for (std::int64_t i = 0; i < count; ++i) {
            const auto weight = static_cast<Real>(round_to(rounding.operand, x[i]));
            const double* value = pages.value(place.sequence, g, vis[i]);
            for (std::int64_t d = 0; d < dim; ++d) acc[d] += weight * static_cast<Real>(value[d]);
          }
          for (std::int64_t d = 0; d < dim; ++d) {
            o[d] = count == 0 ? 0 : round_to(rounding.output, acc[d] / s.sum);
          }
          if (p.lse != nullptr) {
            static_cast<double*>(p.lse)[std::int64_t{h} * p.batch.num_tokens + token] =
                count == 0 ? -kInfinity : s.max + std::log(s.sum);
          }
        }
      }
    });
  });
  return {};
}

std::size_t attend_workspace_bytes(const Backend& backend, const AttendParams& p) {
  const std::int64_t workers = backend.pool->size();
  ArenaSize size;
  size.take<std::int32_t>(p.batch.max_kv_length * workers);
  size.take<double>(p.batch.max_kv_length * workers);
  size.take<double>(p.pages.layout.head_dim * workers);
  size.take<double>(p.pages.layout.head_dim * workers);
  return size.bytes();
}

}  // namespace infllm::reference
