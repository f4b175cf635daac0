// SPDX-License-Identifier: Apache-2.0
//
// Attention of one layer, sparse against dense, prefill in chunks and decode, one table and JSON
// lines. Sparse and dense run chunk by chunk in turn, so that a busy machine disturbs both alike.
//
//   attention_bench --shape minicpm4.1-8b --tokens 32768 --output bench/results/cpu.jsonl
//   attention_bench --shape minicpm4-0.5b --tokens 65536 --every 8     one chunk in eight
//   attention_bench --mode decode --tokens 131072
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bench/support/attention_data.h"
#include "bench/support/attention_work.h"
#include "bench/support/harness.h"
#include "bench/support/peak.h"
#include "infllm/backend/open.h"
#include "infllm/ops/attend.h"
#include "infllm/ops/kernels.h"

namespace infllm::bench {
namespace {

struct Options {
  std::string device = "cpu";
  std::string shape = "minicpm4.1-8b";
  std::string mode = "prefill";
  std::string input = "correlated-0.8";
  std::string dtype = "bf16";
  std::string output;
  std::int64_t tokens = 32768;
  std::int64_t chunk = 512;
  std::int64_t every = 1;
  int threads = 0;
  int repetitions = 1;
};

struct Bench {
  Options options;
  Backend backend;
  AttentionShape shape;
  SparseConfig config;
  DType dtype = DType::kBF16;
  double peak = 0;       // operations per second
  double bandwidth = 0;  // bytes per second
};

struct Row {
  std::string name;
  Timing timing;
  double operations = 0;  // or
  double bytes = 0;
  Timing dense;  // of the peer; none when 0
};

float scale_of(const AttentionShape& shape) {
  return 1 / std::sqrt(static_cast<float>(shape.head_dim));
}

Status report(const Bench& b, const Row& row, double overlap, const std::string& note) {
  const double seconds = row.timing.median;
  Json line = result_line(row.name, b.backend.name);
  line["shape"] = {{"batch", 1},
                   {"heads_q", b.shape.heads_q},
                   {"heads_kv", b.shape.heads_kv},
                   {"head_dim", b.shape.head_dim},
                   {"tokens", b.options.tokens},
                   {"blocks", b.config.budget_blocks()},
                   {"model", b.shape.name},
                   {"dtype", name_of(b.dtype)},
                   {"threads", b.backend.pool->size()}};
  line["input"] = b.options.input;
  add_timing(line, row.timing);
  std::string rate;
  if (row.operations > 0) {
    line["tflops"] = std::round(row.operations / seconds / 1e8) / 1e4;
    line["roofline"] = std::round(row.operations / seconds / b.peak * 1e3) / 1e3;
    rate = fmt::format("{:8.1f} GFLOP/s", row.operations / seconds / 1e9);
  } else {
    line["gbps"] = std::round(row.bytes / seconds / 1e7) / 1e2;
    line["roofline"] = std::round(row.bytes / seconds / b.bandwidth * 1e3) / 1e3;
    rate = fmt::format("{:8.1f} GB/s   ", row.bytes / seconds / 1e9);
  }
  const double share = line["roofline"];
  std::string ratio;
  if (row.dense.median > 0) {
    add_peer(line, "dense", row.dense);
    ratio = fmt::format("  dense/this {:.3f}", row.dense.median / seconds);
  }
  line["overlap"] = std::round(overlap * 1e3) / 1e3;
  if (!note.empty()) line["note"] = note;
  fmt::print("{:<20} {:>12.3f} ms {} {:>5.1f}% of peak{}\n", row.name, seconds * 1e3, rate,
             share * 100, ratio);
  return append_line(b.options.output, line);
}

// The correlation of queries that an input's name asks for.
Result<double> correlation_of(const Bench& b, Layer& layer) {
  if (b.options.input == "random") return 0.0;
  const double overlap = std::stod(b.options.input.substr(b.options.input.find('-') + 1));
  return correlation_for(b.backend, b.shape, b.config, layer, b.options.tokens, overlap);
}

Status run_prefill(const Bench& b) {
  const Options& o = b.options;
  Layer layer =
      INFLLM_TRY(Layer::create(b.backend, b.shape, b.config, b.dtype, o.tokens, /*seed=*/1));
  const double correlation = INFLLM_TRY(correlation_of(b, layer));
  const double overlap =
      INFLLM_TRY(measure_overlap(b.backend, b.shape, b.config, layer, o.tokens, correlation));
  fmt::print("neighbours share {:.0f}% of their freely chosen blocks\n", overlap * 100);
  std::fflush(stdout);

  const std::int64_t row = std::int64_t{b.shape.heads_q} * b.shape.head_dim;
  std::vector<float> q(static_cast<std::size_t>(o.chunk * row));
  std::vector<float> out(q.size());
  std::vector<std::byte> workspace;
  Queries queries(b.shape, correlation, 3);
  AttentionWork work;
  Timing dense;
  Timing sparse;
  StepTimes steps;
  const std::int64_t chunks = ceil_div(o.tokens, o.chunk);
  for (std::int64_t chunk = o.every / 2; chunk < chunks; chunk += o.every) {
    const std::int64_t first = chunk * o.chunk;
    const std::int64_t count = std::min(o.chunk, o.tokens - first);
    queries.fill(std::span(q).first(static_cast<std::size_t>(count * row)));
    const Batch batch = INFLLM_TRY(layer.step(first + count, count, true));
    AttentionParams p{.pages = layer.pages(),
                      .batch = batch,
                      .config = b.config,
                      .heads_q = b.shape.heads_q,
                      .scale = scale_of(b.shape),
                      .q = q.data(),
                      .o = out.data()};
    const AttendParams d{.pages = p.pages,
                         .batch = batch,
                         .heads_q = p.heads_q,
                         .scale = p.scale,
                         .q = p.q,
                         .o = p.o};
    workspace.resize(std::max({workspace.size(), attention_workspace_bytes(b.backend, p),
                               attend_workspace_bytes(b.backend, d)}));
    Status status;
    std::vector<double> sparse_seconds;
    std::vector<double> dense_seconds;
    for (int i = 0; i < o.repetitions; ++i) {
      p.times = &steps;
      const double start = now_seconds();
      INFLLM_TRY(attention(b.backend, p, workspace));
      const double middle = now_seconds();
      INFLLM_TRY(attend(b.backend, d, workspace));
      sparse_seconds.push_back(middle - start);
      dense_seconds.push_back(now_seconds() - middle);
    }
    sparse += summarise(sparse_seconds);
    dense += summarise(dense_seconds);
    work.add(b.shape, b.config, first, first + count);
    std::fprintf(stderr, "\r%lld of %lld tokens", static_cast<long long>(first + count),
                 static_cast<long long>(o.tokens));
  }
  std::fprintf(stderr, "\r%40s\r", "");

  const auto factor = static_cast<double>(o.every);
  const auto step = [&](double seconds) {
    const double each = seconds / o.repetitions * factor;
    return Timing{each, each, each};
  };
  std::string note = fmt::format("chunks of {} tokens", o.chunk);
  if (o.every > 1) note += fmt::format("; one chunk in {} measured, times scaled", o.every);
  const double key_bytes = static_cast<double>(o.tokens) * b.shape.heads_kv * b.shape.head_dim *
                           static_cast<double>(size_of(b.dtype));
  const double sparse_work = work.select + work.attend;
  const Row rows[] = {
      {"compress.forward", step(steps.compress), 0, key_bytes, {}},
      {"select.forward", step(steps.score + steps.select), work.select * factor, 0, {}},
      {"attend.forward", step(steps.attend), work.attend * factor, 0, {}},
      {"dense.forward", dense * factor, work.dense * factor, 0, {}},
      {"attention.forward", sparse * factor, sparse_work * factor, 0, dense * factor},
  };
  for (const Row& r : rows) INFLLM_TRY(report(b, r, overlap, note));
  const double ceiling = work.dense / sparse_work;
  fmt::print(
      "score {:.0f} ms, select {:.0f} ms; sparse is {:.3f} x as fast as dense, {:.1f}% of "
      "the {:.2f} x that operations allow\n",
      steps.score / o.repetitions * factor * 1e3, steps.select / o.repetitions * factor * 1e3,
      dense.median / sparse.median, 100 * dense.median / sparse.median / ceiling, ceiling);
  return {};
}

Status run_decode(const Bench& b) {
  const Options& o = b.options;
  const double kv_bytes = static_cast<double>(o.tokens) * b.shape.heads_kv * b.shape.head_dim * 2 *
                          static_cast<double>(size_of(b.dtype));
  // As many layers as keep a layer's cache out of the processor's caches until its next turn.
  const int count = static_cast<int>(std::clamp(std::ceil(512e6 / kv_bytes), 2.0, 16.0));
  std::vector<Layer> layers;
  for (int i = 0; i < count; ++i) {
    layers.push_back(INFLLM_TRY(Layer::create(b.backend, b.shape, b.config, b.dtype, o.tokens,
                                              static_cast<std::uint64_t>(i) + 1)));
  }
  std::vector<float> q(static_cast<std::size_t>(b.shape.heads_q) * b.shape.head_dim);
  std::vector<float> out(q.size());
  Queries(b.shape, 0, 5).fill(q);
  std::vector<std::byte> workspace;
  StepTimes steps;
  Status status;
  const auto run = [&](bool sparse) {
    for (Layer& layer : layers) {
      const Result<Batch> step = layer.step(o.tokens, 1, sparse);
      if (!step.ok()) status = step.status();
      if (!status.ok()) return;
      const Batch& batch = *step;
      const AttentionParams p{.pages = layer.pages(),
                              .batch = batch,
                              .config = b.config,
                              .heads_q = b.shape.heads_q,
                              .scale = scale_of(b.shape),
                              .q = q.data(),
                              .o = out.data(),
                              .times = sparse ? &steps : nullptr};
      workspace.resize(std::max(workspace.size(), attention_workspace_bytes(b.backend, p)));
      status = attention(b.backend, p, workspace);
    }
  };
  const Repeat repeat{.warmup = 2, .repetitions = std::max(9, o.repetitions)};
  const double per_layer = 1.0 / count;
  const Timing dense = measure(repeat, [&] { run(false); }) * per_layer;
  const Timing sparse = measure(repeat, [&] { run(true); }) * per_layer;
  INFLLM_TRY(Status(status));
  const double budget = std::min<double>(static_cast<double>(o.tokens),
                                         b.config.budget_blocks() * b.config.block_size);
  const double pooled =
      static_cast<double>(b.config.fine_windows(o.tokens) + b.config.coarse_windows(o.tokens));
  const double token_bytes = kv_bytes / static_cast<double>(o.tokens);
  const std::string note = fmt::format("one token, {} layers in turn", count);
  INFLLM_TRY(report(b, {"dense.decode", dense, 0, kv_bytes, {}}, 0, note));
  INFLLM_TRY(report(b, {"attention.decode", sparse, 0, token_bytes * (budget + pooled / 2), dense},
                    0, note));
  const double runs = (repeat.warmup + repeat.repetitions) * count;
  fmt::print(
      "sparse steps: score {:.0f} us, select {:.0f} us, attend {:.0f} us; dense is {:.0f} "
      "GFLOP/s\n",
      steps.score / runs * 1e6, steps.select / runs * 1e6, steps.attend / runs * 1e6,
      4.0 * b.shape.heads_q * b.shape.head_dim * static_cast<double>(o.tokens) / dense.median /
          1e9);
  return {};
}

Status run(const Options& options) {
  const auto* shape = std::ranges::find(kShapes, options.shape, &AttentionShape::name);
  if (shape == std::end(kShapes)) {
    return invalid_argument(
        fmt::format("no shape \"{}\"; choose minicpm4-0.5b or minicpm4.1-8b", options.shape));
  }
  Bench b{.options = options,
          .backend = INFLLM_TRY(open_backend(options.device, {.threads = options.threads})),
          .shape = *shape,
          .dtype = options.dtype == "f32" ? DType::kF32 : DType::kBF16};
  b.peak =
      b.dtype == DType::kF32 ? peak_f32_flops(*b.backend.pool) : peak_bf16_flops(*b.backend.pool);
  b.bandwidth = read_bandwidth(b.backend);
  fmt::print("{} {} with {} threads: {:.0f} GFLOP/s, {:.1f} GB/s; {} tokens, {}, chunks of {}\n",
             b.backend.name, shape->name, b.backend.pool->size(), b.peak / 1e9, b.bandwidth / 1e9,
             options.tokens, options.input, options.chunk);
  std::fflush(stdout);
  return options.mode == "decode" ? run_decode(b) : run_prefill(b);
}

}  // namespace
}  // namespace infllm::bench

int main(int argc, char** argv) {
  infllm::bench::Options o;
  CLI::App app("Attention of one layer, sparse against dense");
  app.add_option("--device", o.device, "cpu, cpu:avx2, ...");
  app.add_option("--shape", o.shape, "minicpm4-0.5b or minicpm4.1-8b");
  app.add_option("--mode", o.mode)->check(CLI::IsMember({"prefill", "decode"}));
  app.add_option("--input", o.input)
      ->check(CLI::IsMember({"random", "correlated-0.9", "correlated-0.8", "correlated-0.7"}));
  app.add_option("--dtype", o.dtype, "of the cache")->check(CLI::IsMember({"bf16", "f32"}));
  app.add_option("--tokens", o.tokens)->check(CLI::Range(64, 1 << 24));
  app.add_option("--chunk", o.chunk, "prefill tokens of one step")->check(CLI::Range(1, 1 << 16));
  app.add_option("--every", o.every, "measure one chunk in this many")->check(CLI::Range(1, 4096));
  app.add_option("--threads", o.threads, "0: one per hardware thread");
  app.add_option("--repetitions", o.repetitions)->check(CLI::Range(1, 1000));
  app.add_option("--output", o.output, "append JSON lines to this file");
  CLI11_PARSE(app, argc, argv);
  const infllm::Status status = infllm::bench::run(o);
  if (!status.ok()) fmt::print(stderr, "attention_bench: {}\n", status.message());
  return status.ok() ? 0 : 1;
}
