// SPDX-License-Identifier: Apache-2.0
//
// InfLLM-V2 (arXiv 2509.24663) on one page. The numbers are the released ones.
//
//   compress   pool the new keys: windows of 32 tokens every 16 (KC1), of 128 every 64 (KC2)
//   score      soft-max each query head against the pooled keys, add up the group's heads, take the
//              best window of every 64-token block
//   select     sink, the last 33 blocks and the best others: 96 blocks for each token and KV head
//   attend     ordinary causal attention over the tokens of those blocks
//
// A sequence shorter than dense_len skips score and select and attends to everything; its keys are
// pooled all the same, so that it can turn sparse at any later token.
#include "infllm/ops/attention.h"

#include <algorithm>
#include <chrono>

#include "infllm/core/arena.h"
#include "infllm/ops/attend.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/score.h"
#include "infllm/ops/select.h"

namespace infllm {
namespace {

// The four steps' parameters; what one step writes the next one reads.
struct Steps {
  CompressParams compress;
  ScoreParams score;
  SelectParams select;
  AttendParams attend;
};

Steps plan(const AttentionParams& p) {
  Steps s;
  s.compress = {.pages = p.pages, .batch = p.batch};
  s.score = {.pages = p.pages,
             .batch = p.batch,
             .config = p.config,
             .heads_q = p.heads_q,
             .scale = p.scale,
             .q = p.config.use_nope ? p.q_score : p.q};
  s.select = {.batch = p.batch, .config = p.config, .heads_kv = p.pages.layout.kv_heads};
  s.attend = {.pages = p.pages,
              .batch = p.batch,
              .heads_q = p.heads_q,
              .scale = p.scale,
              .q = p.q,
              .o = p.o,
              .lse = p.lse};
  return s;
}

std::int64_t score_bytes(const Backend& backend, const Steps& s) {
  return s.select.heads_kv * s.select.batch.num_tokens * s.select.blocks() *
         size_of(backend.kernels->accumulate);
}

std::int64_t selection_size(const Steps& s) {
  return std::int64_t{s.select.heads_kv} * s.select.batch.num_tokens * s.select.columns();
}

// Runs one step and adds the time it took to `seconds`, if anybody asked.
template <typename Step>
Status timed(double* seconds, Step&& step) {
  if (seconds == nullptr) return step();
  const auto start = std::chrono::steady_clock::now();
  Status status = step();
  *seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return status;
}

}  // namespace

Status attention(const Backend& backend, const AttentionParams& p, std::span<std::byte> workspace) {
  Steps s = plan(p);
  StepTimes* times = p.times;
  if (p.pages.layout.pooled_keys) {
    INFLLM_TRY(
        timed(times ? &times->compress : nullptr, [&] { return compress(backend, s.compress); }));
  }
  if (!p.batch.any_sparse) {
    return timed(times ? &times->attend : nullptr,
                 [&] { return attend(backend, s.attend, workspace); });
  }
  Arena arena(workspace);
  s.score.scores = arena.take<std::byte>(score_bytes(backend, s));
  s.select.scores = s.score.scores;
  s.select.selection = arena.take<std::int32_t>(selection_size(s));
  s.attend.selection = s.select.selection;
  s.attend.columns = s.select.columns();

  INFLLM_TRY(timed(times ? &times->score : nullptr,
                   [&] { return score(backend, s.score, arena.rest()); }));
  INFLLM_TRY(timed(times ? &times->select : nullptr, [&] { return select(backend, s.select); }));
  return timed(times ? &times->attend : nullptr,
               [&] { return attend(backend, s.attend, arena.rest()); });
}

std::size_t attention_workspace_bytes(const Backend& backend, const AttentionParams& p) {
  const Steps s = plan(p);
  ArenaSize size;
  if (p.batch.any_sparse) {
    size.take<std::byte>(score_bytes(backend, s));
    size.take<std::int32_t>(selection_size(s));
  }
  size.add(std::max(p.batch.any_sparse ? score_workspace_bytes(backend, s.score) : 0,
                    attend_workspace_bytes(backend, s.attend)));
  return size.bytes();
}

}  // namespace infllm
