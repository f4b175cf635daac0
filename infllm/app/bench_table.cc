// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/bench_table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "infllm/app/progress.h"
#include "infllm/app/report.h"

namespace infllm::app {
namespace {

const BenchRow* find(const std::vector<BenchRow>& rows, const BenchTest& test,
                     std::string_view attention) {
  const auto found = std::ranges::find_if(rows, [&](const BenchRow& row) {
    return row.attention == attention && row.test.prompt == test.prompt &&
           row.test.generated == test.generated && row.test.depth == test.depth;
  });
  return found == rows.end() ? nullptr : &*found;
}

double milliseconds_per_token(double seconds, const BenchRow& row) {
  return seconds * 1e3 / row.timed_runs / row.test.tokens();
}

nlohmann::json row_json(const Session& session, const BenchRow& row) {
  return {{"model", session.name},
          {"dtype", session.dtype},
          {"device", session.backend.name},
          {"threads", session.threads()},
          {"test", row.test.name()},
          {"n_prompt", row.test.prompt},
          {"n_gen", row.test.generated},
          {"n_depth", row.test.depth},
          {"attention", row.attention},
          {"attended_sparsely", row.is_sparse},
          {"visible_share", row.visible_share},
          {"overlap", row.overlap ? nlohmann::json(*row.overlap) : nlohmann::json()},
          {"cache", row.filled ? "made up" : "computed"},
          {"runs", row.runs},
          {"avg_ts", row.rate.mean},
          {"stddev_ts", row.rate.deviation},
          {"ms", row.milliseconds.median},
          {"ms_low", row.milliseconds.low},
          {"ms_high", row.milliseconds.high},
          {"weight_gbps", row.weight_gbps},
          {"cache_gbps", row.cache_gbps},
          {"timed_runs", row.timed_runs},
          {"steps_all_runs", times_json(row.times)}};
}

std::string rate_text(const BenchRow* row) {
  return row == nullptr ? "" : fmt::format("{:.2f} ± {:.2f}", row->rate.mean, row->rate.deviation);
}

// Dense and sparse of one test side by side.
std::string speed_table(const Session& session, const std::vector<BenchRow>& rows) {
  std::string text =
      "| model | weights | size | device | threads | test | dense t/s | sparse t/s | sparse/dense "
      "| attended | overlap | weights GB/s | cache GB/s |\n"
      "|---|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|\n";
  std::vector<std::string> seen;
  for (const BenchRow& row : rows) {
    if (std::ranges::count(seen, row.test.name()) > 0) continue;
    seen.push_back(row.test.name());
    const BenchRow* dense = find(rows, row.test, "dense");
    const BenchRow* sparse = find(rows, row.test, "sparse");
    const BenchRow& last = sparse != nullptr ? *sparse : *dense;
    const std::string ratio = dense != nullptr && sparse != nullptr
                                  ? fmt::format("{:.2f}x", sparse->rate.mean / dense->rate.mean)
                                  : "";
    const auto gbps = [&](double value) {
      return row.test.generated > 0 ? fmt::format("{:.2f}", value) : "";
    };
    const std::string overlap =
        last.overlap ? fmt::format("{:.1f}%", 100 * *last.overlap) : std::string();
    text += fmt::format("| {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.1f}% | {} | {} | {} |\n",
                        session.name, session.dtype,
                        bytes_text(static_cast<double>(session.model->weights().bytes())),
                        session.backend.name, session.threads(), row.test.name(), rate_text(dense),
                        rate_text(sparse), ratio, 100 * last.visible_share, overlap,
                        gbps(last.weight_gbps), gbps(last.cache_gbps));
  }
  return text;
}

std::string step_table(const std::vector<BenchRow>& rows) {
  std::string text =
      "\nMilliseconds per token by step:\n\n"
      "| test | attention | compress | score | select | attend | projections | mlp | other |\n"
      "|---|---|---:|---:|---:|---:|---:|---:|---:|\n";
  for (const BenchRow& row : rows) {
    if (row.timed_runs == 0) continue;
    const model::ForwardTimes& t = row.times;
    const double other = t.embed + t.norm + t.rope + t.cache + t.head;
    text += fmt::format("| {} | {} |", row.test.name(), row.attention);
    for (const double seconds : {t.attention.compress, t.attention.score, t.attention.select,
                                 t.attention.attend, t.projections, t.mlp, other}) {
      text += fmt::format(" {:.4f} |", milliseconds_per_token(seconds, row));
    }
    text += "\n";
  }
  return text;
}

std::string csv(const Session& session, const std::vector<BenchRow>& rows) {
  std::string text =
      "model,dtype,device,threads,test,n_prompt,n_gen,n_depth,attention,visible_share,runs,avg_ts,"
      "stddev_ts,ms,weight_gbps,cache_gbps,compress_ms,score_ms,select_ms,attend_ms\n";
  for (const BenchRow& row : rows) {
    const StepTimes& t = row.times.attention;
    const double each = row.timed_runs > 0 ? 1e3 / row.timed_runs : 0;
    text += fmt::format(
        "{},{},{},{},{},{},{},{},{},{:.6f},{},{:.4f},{:.4f},{:.4f},{:.4f},{:.4f},{:.4f},{:.4f},"
        "{:.4f},{:.4f}\n",
        session.name, session.dtype, session.backend.name, session.threads(), row.test.name(),
        row.test.prompt, row.test.generated, row.test.depth, row.attention, row.visible_share,
        row.runs, row.rate.mean, row.rate.deviation, row.milliseconds.median, row.weight_gbps,
        row.cache_gbps, t.compress * each, t.score * each, t.select * each, t.attend * each);
  }
  return text;
}

}  // namespace

std::string BenchTest::name() const {
  const std::string base =
      generated > 0 ? fmt::format("tg{}", generated) : fmt::format("pp{}", prompt);
  return depth > 0 ? fmt::format("{} @ d{}", base, depth) : base;
}

std::string bench_text(const Session& session, const std::vector<BenchRow>& rows,
                       const std::string& format) {
  if (format == "csv") return csv(session, rows);
  if (format == "md") {
    const bool has_steps =
        std::ranges::any_of(rows, [](const BenchRow& row) { return row.timed_runs > 0; });
    return speed_table(session, rows) + (has_steps ? step_table(rows) : "");
  }
  std::vector<nlohmann::json> objects;
  for (const BenchRow& row : rows) objects.push_back(row_json(session, row));
  if (format == "json") return dump(nlohmann::json(objects), 2) + "\n";
  std::string text;
  for (const nlohmann::json& object : objects) text += dump(object) + "\n";
  return text;
}

nlohmann::json bench_record(const Session& session, const std::vector<BenchRow>& rows) {
  const model::ModelConfig& config = session.config();
  const BenchRow& row = rows.back();
  const bool is_prefill = row.test.generated == 0;
  nlohmann::json record = record_header(session, is_prefill ? "model.prefill" : "model.decode");
  record["shape"] = {{"model", session.name},       {"weights", session.dtype},
                     {"attention", row.attention},  {"batch", 1},
                     {"heads_q", config.heads},     {"heads_kv", config.kv_heads},
                     {"head_dim", config.head_dim}, {"tokens", row.test.tokens()},
                     {"depth", row.test.depth}};
  if (!session.is_device()) record["shape"]["threads"] = session.threads();
  record["input"] = row.repeat == 1 ? "random" : fmt::format("repeat-{}", row.repeat);
  record["ms"] = row.milliseconds.median;
  record["ms_low"] = row.milliseconds.low;
  record["ms_high"] = row.milliseconds.high;
  record["visible_share"] = row.visible_share;
  if (row.overlap) record["overlap"] = std::round(*row.overlap * 1e3) / 1e3;
  if (row.filled) record["note"] = "keys and values in the cache made up, not computed";
  record["steps_ms"] = times_json(row.times);
  for (auto& step : record["steps_ms"]) step = step.get<double>() / row.timed_runs;
  if (row.timed_runs == 0) record.erase("steps_ms");
  if (!is_prefill) record["gbps"] = row.weight_gbps + row.cache_gbps;
  const BenchRow* dense = find(rows, row.test, "dense");
  if (row.attention == "sparse" && dense != nullptr) {
    record["peer"] = "dense";
    record["peer_ms"] = dense->milliseconds.median;
    record["ratio"] = dense->milliseconds.median / row.milliseconds.median;
  }
  return record;
}

}  // namespace infllm::app
