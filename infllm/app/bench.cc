// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "infllm/app/bench_runner.h"
#include "infllm/app/bench_table.h"
#include "infllm/app/commands.h"
#include "infllm/app/progress.h"
#include "infllm/app/record.h"
#include "infllm/app/report.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

// Bytes of the cache that one pass over `visible` reads per layer stack: keys and values of what is
// attended to. Pooled keys are small beside them and left out.
double cache_bytes(const model::ModelConfig& config, DType dtype,
                   const engine::Visibility& visible) {
  return visible.attended * 2 * config.kv_heads * config.head_dim *
         static_cast<double>(size_of(dtype)) * config.layers;
}

BenchRow measure_row(const Session& session, DType kv_dtype, const BenchTest& test,
                     std::string attention, const std::vector<BenchRun>& runs) {
  BenchRow row{.test = test, .attention = std::move(attention)};
  const std::int32_t tokens = test.tokens();
  std::vector<double> rates, milliseconds;
  for (const BenchRun& run : runs) {
    milliseconds.push_back(run.seconds * 1e3);
    rates.push_back(tokens / run.seconds);
    engine::accumulate(run.times, row.times);
  }
  row.rate = summarize(rates);
  row.milliseconds = summarize(milliseconds);
  row.runs = static_cast<std::int32_t>(runs.size());
  row.timed_runs = session.is_device() ? 0 : row.runs;
  row.is_sparse = runs.front().sparse;
  row.visible_share = runs.front().visible.share();
  if (test.generated > 0) {
    const double seconds = row.milliseconds.median / 1e3;
    row.weight_gbps =
        static_cast<double>(session.model->weights().decode_bytes()) * tokens / seconds / 1e9;
    row.cache_gbps = cache_bytes(session.config(), kv_dtype, runs.front().visible) / seconds / 1e9;
  }
  return row;
}

// A host's runs are measured by parts, which costs nothing there; a device's are not, and one more
// run tells the parts.
Result<BenchRow> run_test(BenchRunner& runner, const Session& session, const BenchTest& test,
                          const std::string& attention, const BenchOptions& options,
                          const std::function<void()>& tick) {
  const auto measure = [&](bool by_parts) -> Result<BenchRun> {
    INFLLM_TRY(runner.start(test.depth, test.prompt));
    return test.generated > 0 ? runner.decode(test.generated, by_parts) : runner.prefill(by_parts);
  };
  const bool waits = session.is_device();
  std::vector<BenchRun> runs;
  for (std::int32_t i = options.warmup ? -1 : 0; i < options.repetitions; ++i) {
    const BenchRun run = INFLLM_TRY(measure(!waits));
    if (i >= 0) runs.push_back(run);
    tick();
  }
  BenchRow row = measure_row(session, runner.kv_dtype(), test, attention, runs);
  row.repeat = options.repeat;
  row.filled = options.fill && test.depth > 0;
  if (test.prompt > 0 && row.is_sparse) row.overlap = INFLLM_TRY(runner.overlap());
  if (waits && options.steps) {
    row.times = INFLLM_TRY(measure(true)).times;
    row.timed_runs = 1;
    tick();
  }
  return row;
}

std::vector<BenchTest> list_tests(const BenchOptions& options) {
  std::vector<BenchTest> tests;
  for (const std::int32_t depth : options.depths) {
    for (const std::int32_t count : options.prompt_tokens) {
      if (count > 0) tests.push_back({.prompt = count, .depth = depth});
    }
    for (const std::int32_t count : options.generated_tokens) {
      if (count > 0) tests.push_back({.generated = count, .depth = depth});
    }
  }
  return tests;
}

// Tokens that a cache for all of them holds.
std::int32_t context_of(const std::vector<BenchTest>& tests) {
  std::int32_t context = 0;
  for (const BenchTest& test : tests) context = std::max(context, test.depth + test.tokens());
  return context;
}

// All tests under one kind of attention, so that one cache serves them.
Status run_tests(const Session& session, const Options& options, const std::string& attention,
                 std::vector<BenchRow>& rows, Progress& bar, std::int64_t& done) {
  const std::vector<BenchTest> tests = list_tests(options.bench);
  BenchRunner runner = INFLLM_TRY(
      BenchRunner::create(*session.model, {.context = context_of(tests),
                                           .chunk_tokens = options.model.chunk_tokens,
                                           .kv_dtype = parse_kv_dtype(options.model.kv_dtype),
                                           .dense = attention == "dense",
                                           .repeat = options.bench.repeat,
                                           .fill = options.bench.fill,
                                           .memory_limit = available_memory(session.backend)}));
  for (const BenchTest& test : tests) {
    const std::string note = fmt::format("{} {}", test.name(), attention);
    bar.update(done, note);
    rows.push_back(INFLLM_TRY(run_test(runner, session, test, attention, options.bench,
                                       [&] { bar.update(++done, note); })));
    if (const std::string& file = options.bench.jsonl_file; !file.empty()) {
      INFLLM_TRY(append_records(file, {bench_record(session, rows)}));  // the next may be stopped
    }
  }
  return {};
}

Status bench(const Options& options) {
  std::vector<std::string> modes = INFLLM_TRY(parse_attention_list(options.bench.attention));
  const std::vector<BenchTest> tests = list_tests(options.bench);
  if (tests.empty()) return invalid_argument("nothing to measure: all of -p and -n are 0");
  if (!options.bench.jsonl_file.empty()) {
    INFLLM_TRY(append_records(options.bench.jsonl_file, {}));  // told before the work
  }
  const std::unique_ptr<Session> session =
      INFLLM_TRY(open_session(options.model, options.bench.synthetic));
  print_effective_values(*session, options.model, context_of(tests));
  std::ranges::sort(modes);  // dense first: the peer of the sparse row
  if (!session->config().sparse) std::erase(modes, "sparse");
  if (modes.empty()) {
    return invalid_argument("this model has no sparse attention; add --sparse on");
  }

  const std::int64_t runs = options.bench.repetitions + (options.bench.warmup ? 1 : 0) +
                            (session->is_device() && options.bench.steps ? 1 : 0);
  Progress bar("bench", Progress::Unit::kItems,
               runs * static_cast<std::int64_t>(tests.size() * modes.size()));
  std::int64_t done = 0;
  std::vector<BenchRow> rows;
  for (const std::string& mode : modes) {
    INFLLM_TRY(run_tests(*session, options, mode, rows, bar, done));
  }
  bar.finish();

  return write_stdout(bench_text(*session, rows, options.bench.output));
}

}  // namespace

int bench_command(const Options& options) {
  const Status status = bench(options);
  return status.ok() ? kExitOk : report_failure(status);
}

}  // namespace infllm::app
