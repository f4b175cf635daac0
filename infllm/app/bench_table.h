// SPDX-License-Identifier: Apache-2.0
//
// What `bench` measured, and its renderings: a table, CSV, JSON, benchmark records.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "infllm/app/record.h"
#include "infllm/app/session.h"

namespace infllm::app {

struct BenchTest {
  std::int32_t prompt = 0;     // tokens of the prompt, or
  std::int32_t generated = 0;  // tokens generated one by one,
  std::int32_t depth = 0;      // after so many in the cache

  std::int32_t tokens() const { return prompt + generated; }
  std::string name() const;  // "pp512", "tg128 @ d4096"
};

struct BenchRow {
  BenchTest test;
  std::string attention;   // what was asked for: dense, sparse
  bool is_sparse = false;  // whether some token did attend sparsely
  double visible_share = 1;
  std::int32_t repeat = 1;  // times that each token came in a row
  bool filled = false;      // the cache in front was made up
  // Of a prompt that was attended to sparsely: what its last tokens' selections have in common
  // (ops/overlap.h).
  std::optional<double> overlap;
  std::int32_t runs = 0;
  Summary rate;            // tokens per second
  Summary milliseconds;    // of one run
  double weight_gbps = 0;  // read by decoding, 10^9 bytes per second
  double cache_gbps = 0;
  model::ForwardTimes times;  // of timed_runs together
  std::int32_t timed_runs = 0;
};

// `format` is md, csv, json or jsonl.
std::string bench_text(const Session& session, const std::vector<BenchRow>& rows,
                       const std::string& format);

// The last row as a model.prefill or model.decode line of bench/results; a sparse row has its dense
// one as peer, if that is among the rows.
nlohmann::json bench_record(const Session& session, const std::vector<BenchRow>& rows);

}  // namespace infllm::app
