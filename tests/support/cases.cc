// SPDX-License-Identifier: Apache-2.0
#include "tests/support/cases.h"

#include "infllm/core/status.h"

namespace infllm::testing {
namespace {

// The last `tokens` of a sequence of `length`; all of them if there are fewer.
Span tail(std::int32_t length, std::int32_t tokens) {
  return {std::max(0, length - tokens), length};
}

Step tails(const std::vector<std::int32_t>& lengths, std::int32_t tokens) {
  Step step;
  for (const std::int32_t length : lengths) step.push_back(tail(length, tokens));
  return step;
}

// Tokens first .. end - 1 of `sequences` equal sequences, `tokens` a step.
std::vector<Step> pieces(std::int32_t sequences, std::int32_t first, std::int32_t end,
                         const std::vector<std::int32_t>& sizes) {
  std::vector<Step> steps;
  for (std::size_t i = 0; first < end; ++i) {
    const std::int32_t next = std::min(end, first + sizes[i % sizes.size()]);
    steps.emplace_back(static_cast<std::size_t>(sequences), Span{first, next});
    first = next;
  }
  return steps;
}

// A mid-size ragged step: a long history that is no multiple of 16 or 64, a whole prompt, one
// decoding token, an empty sequence.
Step ragged() { return {{517, 541}, {0, 70}, {460, 461}, {0, 0}, {701, 720}}; }

SparseConfig with(void (*change)(SparseConfig&)) {
  SparseConfig config = small_config();
  change(config);
  return config;
}

std::vector<Case> make_cases() {
  const std::vector<std::int32_t> edges = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129};
  const SparseConfig small = small_config();
  std::vector<Case> list;
  const auto add = [&](Case c) {
    c.seed = list.size() + 1;
    list.push_back(std::move(c));
  };

  // Around every window and block, whole prompts and single tokens.
  add({"edges_prefill", small, 4, 2, 64, {tails(edges, 1000)}});
  add({"edges_decode", small, 4, 2, 64, {tails(edges, 1)}});
  // Around the budget, where the first block has to be dropped.
  add({"budget_edge", small, 4, 2, 64, {tails({383, 384, 385, 386, 447, 448, 449}, 66)}});
  // Around dense_len, with dense sequences inside a sparse batch and sparse ones turning up.
  add({"dense_len_edge",
       with([](SparseConfig& c) { c.dense_len = 512; }),
       4,
       2,
       64,
       {tails({511, 512, 513, 130, 0}, 40)}});
  add({"dense_only",
       with([](SparseConfig& c) { c.dense_len = 4096; }),
       4,
       2,
       128,
       {tails({511, 33, 200}, 40)}});
  add({"crosses_dense_len", with([](SparseConfig& c) { c.dense_len = 512; }), 4, 2, 64,
       pieces(2, 500, 518, {1})});

  // Group sizes, KV heads, head dimensions.
  add({"group_1", small, 2, 2, 64, {ragged()}});
  add({"group_1_heads_8", small, 8, 8, 64, {tails({530, 90}, 7)}});
  add({"group_2_dim_128", small, 4, 2, 128, {ragged()}});
  add({"group_4_heads_4", small, 16, 4, 64, {tails({530, 90}, 9)}});
  add({"group_7", small, 14, 2, 64, {ragged()}});
  add({"group_8_heads_1", small, 8, 1, 128, {tails({530, 90}, 17)}});
  add({"group_16", small, 32, 2, 64, {tails({530, 90}, 9)}});
  add({"group_32", small, 32, 1, 64, {tails({530, 90}, 9)}});

  // Arrival in pieces. 1, 15, 48 and 64 put chunk borders before, on and behind those of windows
  // and blocks.
  add({"chunked", small, 4, 2, 64, pieces(2, 0, 611, {1, 15, 48, 64, 200, 17, 3})});
  add({"token_by_token", small, 4, 2, 64, pieces(1, 370, 470, {1})});
  add({"first_tokens", small, 4, 2, 64, pieces(1, 0, 70, {1})});
  // Not all sequences take part in every step.
  add({"taking_turns",
       small,
       4,
       2,
       64,
       {{{430, 450}, {10, 10}}, {{450, 450}, {10, 500}}, {{450, 451}, {500, 501}}}});

  // More blocks than one machine word of a mask holds, and many more than the budget.
  add({"many_blocks", small, 4, 2, 64, {tails({4500, 2030}, 19)}});

  // Variants.
  add({"legacy_window",
       with([](SparseConfig& c) { c.legacy_window = true; }),
       4,
       2,
       64,
       {ragged()}});
  add({"use_nope", with([](SparseConfig& c) { c.use_nope = true; }), 4, 2, 64, {ragged()}});
  add({"fine_lse",
       with([](SparseConfig& c) { c.lse_source = LseSource::kFine; }),
       4,
       2,
       64,
       {ragged()}});
  add({"no_score_rounding",
       with([](SparseConfig& c) { c.score_rounding = ScoreRounding::kNone; }),
       4,
       2,
       64,
       {ragged()}});
  add({"no_sink", with([](SparseConfig& c) { c.init_blocks = 0; }), 4, 2, 64, {ragged()}});
  add({"no_window", with([](SparseConfig& c) { c.window_size = 0; }), 4, 2, 64, {ragged()}});
  // Budgets smaller than what is forced: own block, then the window from near to far, then sink.
  add({"budget_below_forced",
       with([](SparseConfig& c) {
         c.init_blocks = 3;
         c.topk = 1;
       }),
       4,
       2,
       64,
       {ragged()}});
  add({"budget_of_one",
       with([](SparseConfig& c) {
         c.window_size = 0;
         c.topk = 1;
       }),
       4,
       2,
       64,
       {ragged()}});

  // Other windows.
  add({"windows_16_8",
       with([](SparseConfig& c) {
         c.kernel_size = 16;
         c.kernel_stride = 8;
       }),
       4,
       2,
       64,
       {ragged()}});
  add({"windows_48_16", with([](SparseConfig& c) { c.kernel_size = 48; }), 4, 2, 64, {ragged()}});
  add({"windows_16_16", with([](SparseConfig& c) { c.kernel_size = 16; }), 4, 2, 64, {ragged()}});

  // Values.
  add({"zero_queries", small, 4, 2, 64, {ragged()}, Content::kZero});
  add({"equal_blocks", small, 4, 2, 64, {ragged()}, Content::kTies});
  add({"extreme_logits", small, 4, 2, 64, {ragged()}, Content::kExtreme});

  // The released numbers, at both sides of 96 blocks and of dense_len.
  const SparseConfig released;
  add({"released",
       [] {
         SparseConfig config;
         config.dense_len = -1;
         return config;
       }(),
       4,
       2,
       64,
       {{{6300, 6333}, {6143, 6146}, {0, 70}}}});
  add({"released_switch", released, 16, 1, 128, {{{8190, 8192}, {8190, 8191}}}});
  return list;
}

}  // namespace

SparseConfig small_config() {
  SparseConfig config;
  config.window_size = 128;
  config.topk = 4;
  config.dense_len = -1;
  return config;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> list = make_cases();
  return list;
}

const Case& case_named(const std::string& name) {
  for (const Case& c : cases()) {
    if (c.name == name) return c;
  }
  INFLLM_CHECK(false, "no case is called " + name);
}

}  // namespace infllm::testing
