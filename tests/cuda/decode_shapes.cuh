// SPDX-License-Identifier: Apache-2.0
//
// The decode steps that `decode_main check` runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/cuda/decode_case.cuh"
#include "tests/cuda/small_config.h"

namespace infllm::decode_check {

using cuda::small_config;

inline std::vector<Shape> shapes(bool tiny) {
  const std::vector<std::int32_t> edges = {1,   15,  16,  17,  31,  32,  33,   63,   64,   65,
                                           0,   127, 128, 129, 191, 192, 193,  383,  384,  385,
                                           386, 399, 400, 447, 448, 449, 1000, 2047, 2048, 2049};
  const std::vector<std::int32_t> few = {1, 64, 0, 129, 385, 1000};
  std::vector<Shape> all;
  const auto add = [&](Shape s, std::string name) {
    s.name = std::move(name);
    all.push_back(std::move(s));
  };
  if (tiny) {
    add({.lengths = {385, 1000}, .heads_q = 8, .config = small_config()}, "tiny_few");
    add({.lengths = few, .heads_q = 8, .config = small_config()}, "tiny_d128");
    add({.lengths = few,
         .heads_q = 2,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "tiny_d64_f16");
    add({.lengths = few, .heads_q = 8, .dense = true}, "tiny_dense");
    add({.lengths = few, .heads_q = 8, .config = small_config(), .missing = 3}, "tiny_missing");
    return all;
  }
  for (const int group : {1, 2, 4, 7, 8, 16, 32}) {
    add({.lengths = edges, .heads_q = 2 * group, .config = small_config()},
        "edges_g" + std::to_string(group) + "_d128");
    add({.lengths = edges,
         .heads_q = group,
         .heads_kv = 1,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "edges_g" + std::to_string(group) + "_d64_f16");
  }
  add({.lengths = edges, .heads_q = 48, .heads_kv = 1, .dense = true}, "edges_dense_g48");
  add({.lengths = edges, .heads_q = 8, .dense = true}, "edges_dense");
  Shape s{.lengths = edges, .heads_q = 16, .config = small_config()};
  s.content = Content::kZeroQueries;
  add(s, "edges_zero_queries");
  s.content = Content::kRepeatedKeys;
  add(s, "edges_ties");
  s.config.score_rounding = ScoreRounding::kNone;
  add(s, "edges_ties_unrounded");
  s.content = Content::kNatural;
  add(s, "edges_unrounded");
  s.config.lse_source = LseSource::kFine;
  add(s, "edges_fine_lse");
  s = {.lengths = edges, .heads_q = 16, .config = small_config()};
  s.config.legacy_window = true;
  add(s, "edges_legacy_window");
  s.config = small_config();
  s.config.init_blocks = 0;
  add(s, "edges_no_sink");
  s.config.init_blocks = 5;
  add(s, "edges_5_sinks");
  s.config.init_blocks = 9;  // more forced blocks than the budget holds
  add(s, "edges_9_sinks");
  s.config = small_config();
  s.config.window_size = 0;
  add(s, "edges_no_window");
  s.config.topk = 1;
  add(s, "edges_budget_1");
  // Few rows, so that many thread blocks share one.
  for (const int group : {1, 4, 7, 16}) {
    for (const auto& lengths :
         {std::vector<std::int32_t>{385}, {449, 2049}, {0, 64, 33, 400}, {31, 6209, 1}}) {
      add({.lengths = lengths, .heads_q = 2 * group, .config = small_config()},
          "few_" + std::to_string(lengths.size()) + "_g" + std::to_string(group));
    }
    add({.lengths = {3000, 20001},
         .heads_q = group,
         .heads_kv = 1,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "few_g" + std::to_string(group) + "_d64_f16");
  }
  s = {.lengths = {9000, 500, 40000}, .heads_q = 8, .config = small_config()};
  s.config.lse_source = LseSource::kFine;
  add(s, "few_fine_lse");
  s.config = small_config();
  s.config.init_blocks = 0;
  s.config.legacy_window = true;
  add(s, "few_no_sink");
  s.content = Content::kRepeatedKeys;
  add(s, "few_ties");
  s = {.lengths = {9000, 500, 40000}};
  s.config.dense_len = 8192;
  add(s, "few_mixed");
  // The released numbers.
  s = {.lengths = {6143, 6144, 6145, 6208, 6209, 8191, 8192, 8193, 300, 0, 12345, 16384, 31000}};
  add(s, "released");
  s.config.dense_len = 8192;
  s.max_kv_length = 131072;
  add(s, "released_in_a_large_graph");
  s.lengths = {70001};
  add(s, "released_one");
  s.lengths = {66000, 131072, 9000};
  s.max_kv_length = 0;
  add(s, "released_three");
  s.lengths = {40001};
  s.dense = true;
  add(s, "dense_40k");
  s.lengths.assign(40, 0);
  for (int i = 0; i < 40; ++i) s.lengths[i] = 1 + 997 * i % 4967;
  add(s, "dense_ragged_40");
  s.dense = false;
  s.config.dense_len = 4000;
  add(s, "mixed_ragged_40");
  s.lengths.assign(150, 0);
  for (int i = 0; i < 150; ++i) s.lengths[i] = 1 + 997 * i % 4967;
  s.config = small_config();
  s.heads_q = 8;
  add(s, "ragged_150");
  // From 12 parts a row to one.
  for (const int sequences : {5, 7, 11, 16, 23, 33, 64, 66}) {
    s.lengths.assign(sequences, 0);
    for (int i = 0; i < sequences; ++i) s.lengths[i] = (i % 7 == 2 ? 0 : 1) + 1597 * i % 6389;
    s.missing = 0;
    add(s, "ragged_" + std::to_string(sequences));
    s.missing = 5;
    add(s, "ragged_missing_" + std::to_string(sequences));
  }
  s = {.lengths = {66000, 40001, 0, 300, 8193, 70001, 12345, 31000, 6208}};
  s.config.dense_len = 8192;
  s.missing = 7;
  add(s, "released_nine");
  return all;
}

}  // namespace infllm::decode_check
