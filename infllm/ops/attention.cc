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
#include "infllm/ops/score_select.h"
#include "infllm/ops/select_attend.h"

namespace infllm {
namespace {

// The four steps' parameters; what one step writes the next one reads.
struct Steps {
  CompressParams compress;
  ScoreSelectParams choose;
  AttendParams attend;
};

Steps plan(const AttentionParams& p) {
  Steps s;
  s.compress = {.pages = p.pages, .batch = p.batch};
  s.choose.score = {.pages = p.pages,
                    .batch = p.batch,
                    .config = p.config,
                    .heads_q = p.heads_q,
                    .scale = p.scale,
                    .q = p.config.use_nope ? p.q_score : p.q};
  s.choose.select = {.batch = p.batch, .config = p.config, .heads_kv = p.pages.layout.kv_heads};
  s.attend = {.pages = p.pages,
              .batch = p.batch,
              .heads_q = p.heads_q,
              .scale = p.scale,
              .q = p.q,
              .o = p.o,
              .lse = p.lse};
  return s;
}

std::int64_t score_bytes(const Backend& backend, const SelectParams& p) {
  return std::int64_t{p.heads_kv} * p.batch.num_tokens * p.blocks() *
         size_of(backend.kernels->accumulate);
}

std::int64_t selection_size(const SelectParams& p) {
  return std::int64_t{p.heads_kv} * p.batch.num_tokens * p.columns();
}

// Runs one step and adds the time it took to `times`' field, if anybody asked.
template <typename Run>
Status timed(const Backend& backend, StepTimes* times, double StepTimes::*field, Run&& run) {
  if (times == nullptr) return run();
  INFLLM_TRY(synchronize(backend));
  const auto start = std::chrono::steady_clock::now();
  INFLLM_TRY(run());
  INFLLM_TRY(synchronize(backend));
  times->*field += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {};
}

// Score, then select, on a column that has them apart: the scores travel through the workspace.
Status choose_in_two(const Backend& backend, ScoreSelectParams& choose, StepTimes* times,
                     Arena arena) {
  choose.score.scores = arena.take<std::byte>(score_bytes(backend, choose.select));
  choose.select.scores = choose.score.scores;
  INFLLM_TRY(timed(backend, times, &StepTimes::score,
                   [&] { return score(backend, choose.score, arena.rest()); }));
  return timed(backend, times, &StepTimes::select, [&] { return select(backend, choose.select); });
}

// Score and select, by whichever way the column has.
Status choose(const Backend& backend, Steps& s, StepTimes* times, Arena arena) {
  if (!has_score_select(backend, s.choose)) return choose_in_two(backend, s.choose, times, arena);
  return timed(backend, times, &StepTimes::score,
               [&] { return score_select(backend, s.choose, arena.rest()); });
}

}  // namespace

Status attention(const Backend& backend, const AttentionParams& p, std::span<std::byte> workspace) {
  Steps s = plan(p);
  Arena arena(workspace);
  if (p.pages.layout.pooled_keys && !p.pooled) {
    INFLLM_TRY(timed(backend, p.times, &StepTimes::compress,
                     [&] { return compress(backend, s.compress); }));
  }
  if (p.batch.any_sparse) {
    s.choose.select.selection = arena.take<std::int32_t>(selection_size(s.choose.select));
    s.attend.selection = s.choose.select.selection;
    s.attend.columns = s.choose.select.columns();
    const SelectAttendParams together{s.choose, s.attend, p.pooled};
    if (p.times == nullptr && has_select_attend(backend, together)) {
      return select_attend(backend, together, arena.rest());
    }
    INFLLM_TRY(choose(backend, s, p.times, arena));
    if (has_score_select(backend, s.choose)) s.attend.follows_select = &p.config;
  }
  return timed(backend, p.times, &StepTimes::attend,
               [&] { return attend(backend, s.attend, arena.rest()); });
}

Status attention_selection(const Backend& backend, const AttentionParams& p,
                           std::int32_t* selection, std::span<std::byte> workspace) {
  Steps s = plan(p);
  s.choose.select.selection = selection;
  return choose(backend, s, p.times, Arena(workspace));
}

std::int32_t selection_columns(const AttentionParams& p) { return plan(p).choose.select.columns(); }

std::size_t attention_workspace_bytes(const Backend& backend, const AttentionParams& p) {
  Steps s = plan(p);
  ArenaSize size;
  ArenaSize choosing;
  if (p.batch.any_sparse) {
    size.take<std::int32_t>(selection_size(s.choose.select));
    if (has_score_select(backend, s.choose)) {
      choosing.add(score_select_workspace_bytes(backend, s.choose));
    } else {
      choosing.take<std::byte>(score_bytes(backend, s.choose.select));
      choosing.add(score_workspace_bytes(backend, s.choose.score));
    }
    // A stand-in: what attend needs may depend on there being a selection, not on its contents.
    static constexpr std::int32_t kSomeSelection = 0;
    s.attend.selection = &kSomeSelection;
    s.attend.columns = s.choose.select.columns();
    const SelectAttendParams together{s.choose, s.attend, p.pooled};
    if (has_select_attend(backend, together)) {
      choosing.add(select_attend_workspace_bytes(backend, together));
    }
  }
  // Choosing and attending, or both at once, use the same memory behind the selection, one after
  // the other.
  size.add(std::max(choosing.bytes(), attend_workspace_bytes(backend, s.attend)));
  return size.bytes();
}

}  // namespace infllm
