// SPDX-License-Identifier: Apache-2.0
//
// Attention of one layer on a device: each step and the whole, for whole prompts and for one token
// of many sequences, as a table and JSON lines. Times are those of replayed graphs.
//
//   device_bench --tokens 8192,32768,131072 --input correlated-0.8 --output h200.jsonl
//   device_bench --mode decode --tokens 131072 --batch 1,16,64
//   device_bench --mode backward --tokens 32768,131072
//   device_bench --tokens 32768 --input trace --trace-model models/needle-32k --trace-text book.txt
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bench/support/attention_data.h"
#include "bench/support/attention_work.h"
#include "bench/support/device_timer.h"
#include "bench/support/harness.h"
#include "bench/support/trace.h"
#include "infllm/backend/open.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/kernels.h"

namespace infllm::bench {
namespace {

struct Options {
  std::string device = "cuda";
  std::string shape = "minicpm4.1-8b";
  std::string mode = "prefill";
  std::string input = "correlated-0.8";
  std::vector<std::int64_t> tokens = {8192, 32768, 131072};
  std::vector<std::int32_t> batch = {1};
  std::int64_t dense_limit = 1 << 20;  // longest prompt that is measured densely too
  int repetitions = 5;
  TraceOptions trace{.layer = 3};
  std::string output;
};

struct Bench {
  Options options;
  Backend backend;
  AttentionShape shape;
  SparseConfig config;
  DevicePeak peak;
  // Of the test that runs.
  std::int64_t tokens = 0;
  std::int32_t batch = 1;
  double overlap = 0;
};

struct Row {
  std::string name;
  Timing timing;
  double operations = 0;  // or
  double bytes = 0;
  Timing dense;  // of our own dense attention; none when 0
  std::string note;
};

float scale_of(const AttentionShape& shape) {
  return 1 / std::sqrt(static_cast<float>(shape.head_dim));
}

double rounded(double value, double unit) { return std::round(value / unit) * unit; }

Status report(const Bench& b, const Row& row) {
  const double seconds = row.timing.median;
  Json line = result_line(row.name, b.backend);
  line["shape"] = {{"batch", b.batch},
                   {"heads_q", b.shape.heads_q},
                   {"heads_kv", b.shape.heads_kv},
                   {"head_dim", b.shape.head_dim},
                   {"tokens", b.tokens},
                   {"blocks", b.config.budget_blocks()},
                   {"model", b.shape.name},
                   {"dtype", name_of(b.backend.kernels->activation)}};
  line["input"] = b.options.input;
  add_timing(line, row.timing);
  std::string rate;
  if (row.operations > 0) {
    line["tflops"] = rounded(row.operations / seconds / 1e12, 0.1);
    line["roofline"] = rounded(row.operations / seconds / b.peak.flops, 1e-3);
    rate = fmt::format("{:7.1f} TFLOP/s", row.operations / seconds / 1e12);
  } else {
    line["gbps"] = rounded(row.bytes / seconds / 1e9, 0.1);
    line["roofline"] = rounded(row.bytes / seconds / b.peak.bandwidth, 1e-3);
    rate = fmt::format("{:7.1f} GB/s   ", row.bytes / seconds / 1e9);
  }
  const double share = line["roofline"];
  std::string ratio;
  if (row.dense.median > 0) {
    add_peer(line, "dense", row.dense);
    ratio = fmt::format("  dense/this {:.2f}", row.dense.median / seconds);
  }
  if (b.overlap > 0) line["overlap"] = rounded(b.overlap, 1e-3);
  if (!row.note.empty()) line["note"] = row.note;
  fmt::print("{:<18} {:>8} {:>3} {:>10.4f} ms {} {:>5.1f}%{}\n", row.name, b.tokens, b.batch,
             seconds * 1e3, rate, share * 100, ratio);
  std::fflush(stdout);
  return append_line(b.options.output, line);
}

// The queries' correlation that the input asks for; leaves the overlap that it yields in `b`.
Result<double> correlation_of(Bench& b, Layer& layer) {
  double correlation = 0;
  if (b.options.input != "random") {
    const double overlap = std::stod(b.options.input.substr(b.options.input.find('-') + 1));
    correlation =
        INFLLM_TRY(correlation_for(b.backend, b.shape, b.config, layer, b.tokens, overlap));
  }
  b.overlap =
      INFLLM_TRY(measure_overlap(b.backend, b.shape, b.config, layer, b.tokens, correlation));
  return correlation;
}

// Memory that grows with the step that asks for most.
struct Scratch {
  Buffer memory;
  Result<std::span<std::byte>> get(const Backend& backend, std::size_t bytes) {
    if (memory.bytes() < bytes) {
      memory = Buffer();
      memory = INFLLM_TRY(allocate(backend, bytes));
    }
    return std::span<std::byte>(memory.data(), bytes);
  }
};

Status run_prefill(Bench& b, std::int64_t tokens) {
  b.tokens = tokens;
  const bool is_trace = b.options.input == "trace";
  Layer layer = INFLLM_TRY(
      Layer::create(b.backend, b.shape, b.config, b.backend.kernels->activation, tokens, 1));
  const double correlation = is_trace ? 0.0 : INFLLM_TRY(correlation_of(b, layer));
  const Buffer q = INFLLM_TRY(many_queries(b.backend, b.shape, correlation, tokens, 3));
  const Buffer o = INFLLM_TRY(allocate(b.backend, q.bytes()));
  const Batch batch = INFLLM_TRY(layer.step(tokens, tokens, true));
  AttentionWork work;
  work.add(b.shape, b.config, 0, tokens);
  const int repetitions = tokens > 200'000 ? 1 : b.options.repetitions;
  Scratch scratch;

  AttendParams attend_params{.pages = layer.pages(),
                             .batch = batch,
                             .heads_q = b.shape.heads_q,
                             .scale = scale_of(b.shape),
                             .q = q.data(),
                             .o = o.data()};
  const auto time_attend = [&]() -> Result<Timing> {
    const std::span<std::byte> workspace =
        INFLLM_TRY(scratch.get(b.backend, attend_workspace_bytes(b.backend, attend_params)));
    return time_steps(b.backend, repetitions,
                      [&] { return attend(b.backend, attend_params, workspace); });
  };
  if (is_trace) {
    TraceOptions options = b.options.trace;
    options.tokens = static_cast<std::int32_t>(tokens);
    const Trace trace = INFLLM_TRY(trace_selection(b.backend, b.config, options));
    if (trace.heads_kv != b.shape.heads_kv) {
      return invalid_argument(fmt::format("{} has {} KV heads, expected {}", options.model,
                                          trace.heads_kv, b.shape.heads_kv));
    }
    const std::size_t bytes = trace.selection.size() * sizeof(trace.selection[0]);
    const Buffer selection = INFLLM_TRY(allocate(b.backend, bytes));
    INFLLM_TRY(copy_in(b.backend, selection.data(), trace.selection.data(), bytes));
    b.overlap = trace.overlap;
    attend_params.selection = selection.as<std::int32_t>();
    attend_params.columns = trace.columns;
    const Timing attended = INFLLM_TRY(time_attend());
    return report(b, {.name = "attend.forward",
                      .timing = attended,
                      .operations = work.attend,
                      .note = fmt::format("selections of layer {} of needle-32k", options.layer)});
  }

  const double key_bytes = static_cast<double>(tokens) * b.shape.heads_kv * b.shape.head_dim *
                           static_cast<double>(size_of(b.backend.kernels->activation));
  const Timing pool = INFLLM_TRY(time_steps(b.backend, repetitions, [&] {
    return compress(b.backend, {.pages = layer.pages(), .batch = batch});
  }));
  INFLLM_TRY(report(b, {.name = "compress.forward", .timing = pool, .bytes = key_bytes}));
  {
    Chooser chooser =
        INFLLM_TRY(Chooser::create(b.backend, b.shape, b.config, layer.pages(), batch));
    const Timing chosen = INFLLM_TRY(
        time_steps(b.backend, repetitions, [&] { return chooser.run(b.backend, q.data()); }));
    INFLLM_TRY(
        report(b, {.name = "select.forward",
                   .timing = chosen,
                   .operations = work.select,
                   .note = fmt::format("workspace {:.0f} MB",
                                       static_cast<double>(chooser.workspace_bytes()) / 1e6)}));
    attend_params.selection = chooser.selection();
    attend_params.columns = chooser.columns();
    const Timing attended = INFLLM_TRY(time_attend());
    INFLLM_TRY(
        report(b, {.name = "attend.forward", .timing = attended, .operations = work.attend}));
    attend_params.selection = nullptr;
    attend_params.columns = 0;
  }
  const AttentionParams whole{.pages = layer.pages(),
                              .batch = batch,
                              .config = b.config,
                              .heads_q = b.shape.heads_q,
                              .scale = scale_of(b.shape),
                              .q = q.data(),
                              .o = o.data()};
  const std::span<std::byte> workspace =
      INFLLM_TRY(scratch.get(b.backend, attention_workspace_bytes(b.backend, whole)));
  const Timing sparse = INFLLM_TRY(
      time_steps(b.backend, repetitions, [&] { return attention(b.backend, whole, workspace); }));
  Timing dense;
  if (tokens <= b.options.dense_limit) {
    dense = INFLLM_TRY(time_attend());
    INFLLM_TRY(report(b, {.name = "dense.forward", .timing = dense, .operations = work.dense}));
  }
  return report(
      b,
      {.name = "attention.forward", .timing = sparse, .operations = work.sparse(), .dense = dense});
}

// Gradients, with the selection that the forward pass made: by themselves, and the whole op with
// them.
Status run_backward(Bench& b, std::int64_t tokens) {
  b.tokens = tokens;
  Layer layer = INFLLM_TRY(
      Layer::create(b.backend, b.shape, b.config, b.backend.kernels->activation, tokens, 1));
  const double correlation = INFLLM_TRY(correlation_of(b, layer));
  const Buffer q = INFLLM_TRY(many_queries(b.backend, b.shape, correlation, tokens, 3));
  const Buffer grad_o = INFLLM_TRY(many_queries(b.backend, b.shape, 0, tokens, 9));
  const Buffer o = INFLLM_TRY(allocate(b.backend, q.bytes()));
  const Buffer grad_q = INFLLM_TRY(allocate(b.backend, q.bytes()));
  const auto group = static_cast<std::size_t>(b.shape.heads_q / b.shape.heads_kv);
  const Buffer grad_k = INFLLM_TRY(allocate(b.backend, q.bytes() / group));
  const Buffer grad_v = INFLLM_TRY(allocate(b.backend, q.bytes() / group));
  const Buffer lse = INFLLM_TRY(
      allocate(b.backend, static_cast<std::size_t>(tokens * b.shape.heads_q) * sizeof(float)));
  const Batch batch = INFLLM_TRY(layer.step(tokens, tokens, true));
  Chooser chooser = INFLLM_TRY(Chooser::create(b.backend, b.shape, b.config, layer.pages(), batch));
  AttendBackwardParams params{.forward = {.pages = layer.pages(),
                                          .batch = batch,
                                          .heads_q = b.shape.heads_q,
                                          .scale = scale_of(b.shape),
                                          .q = q.data(),
                                          .o = o.data(),
                                          .lse = lse.data()},
                              .grad_o = grad_o.data(),
                              .grad_q = grad_q.data(),
                              .grad_k = grad_k.data(),
                              .grad_v = grad_v.data()};
  AttentionWork work;
  work.add(b.shape, b.config, 0, tokens);
  const int repetitions = tokens > 200'000 ? 1 : b.options.repetitions;
  Scratch scratch;
  std::size_t needed = 0;
  // The gradients alone, then all steps.
  const auto time_both = [&](bool sparse) -> Result<std::array<Timing, 2>> {
    params.forward.selection = sparse ? chooser.selection() : nullptr;
    params.forward.columns = sparse ? chooser.columns() : 0;
    needed = attend_backward_workspace_bytes(b.backend, params);
    const std::span<std::byte> workspace = INFLLM_TRY(scratch.get(
        b.backend, std::max(needed, attend_workspace_bytes(b.backend, params.forward))));
    const auto forward = [&]() -> Status {
      if (sparse) {
        INFLLM_TRY(compress(b.backend, {.pages = layer.pages(), .batch = batch}));
        INFLLM_TRY(chooser.run(b.backend, q.data()));
      }
      return attend(b.backend, params.forward, workspace);
    };
    INFLLM_TRY(forward());
    const Timing back = INFLLM_TRY(time_steps(
        b.backend, repetitions, [&] { return attend_backward(b.backend, params, workspace); }));
    const Timing whole = INFLLM_TRY(time_steps(b.backend, repetitions, [&]() -> Status {
      INFLLM_TRY(forward());
      return attend_backward(b.backend, params, workspace);
    }));
    return std::array{back, whole};
  };
  const auto note = [&] {
    return fmt::format("workspace {:.0f} MB", static_cast<double>(needed) / 1e6);
  };
  std::array<Timing, 2> dense;
  if (tokens <= b.options.dense_limit) {
    dense = INFLLM_TRY(time_both(false));
    INFLLM_TRY(report(b, {.name = "dense.backward",
                          .timing = dense[0],
                          .operations = 2.5 * work.dense,
                          .note = note()}));
    INFLLM_TRY(report(
        b, {.name = "dense.forward_backward", .timing = dense[1], .operations = 3.5 * work.dense}));
  }
  const std::array<Timing, 2> sparse = INFLLM_TRY(time_both(true));
  INFLLM_TRY(report(b, {.name = "attend.backward",
                        .timing = sparse[0],
                        .operations = 2.5 * work.attend,
                        .dense = dense[0],
                        .note = note()}));
  return report(b, {.name = "attention.forward_backward",
                    .timing = sparse[1],
                    .operations = work.select + 3.5 * work.attend,
                    .dense = dense[1]});
}

// One token of each of `batch` sequences: chooses and attends, or attends to everything. As many
// layers in turn as keep a layer's cache out of the device's own caches until its next turn.
Status run_decode(Bench& b, std::int64_t tokens, std::int32_t batch) {
  b.tokens = tokens;
  b.batch = batch;
  b.overlap = 0;
  const auto element = static_cast<double>(size_of(b.backend.kernels->activation));
  const DecodeBytes bytes(b.shape, b.config, tokens, element);
  const int count =
      static_cast<int>(std::clamp(std::ceil(200e6 / (bytes.sparse * batch)), 2.0, 24.0));
  std::vector<Layer> layers;
  for (int i = 0; i < count; ++i) {
    layers.push_back(
        INFLLM_TRY(Layer::create(b.backend, b.shape, b.config, b.backend.kernels->activation,
                                 tokens, static_cast<std::uint64_t>(i) + 1, batch)));
  }
  const Buffer q = INFLLM_TRY(many_queries(b.backend, b.shape, 0, batch, 5));
  const Buffer o = INFLLM_TRY(allocate(b.backend, q.bytes()));
  Scratch scratch;
  const auto time_decode = [&](bool sparse) -> Result<Timing> {
    std::vector<AttentionParams> steps;
    std::size_t needed = 0;
    for (Layer& layer : layers) {
      steps.push_back({.pages = layer.pages(),
                       .batch = INFLLM_TRY(layer.step(tokens, 1, sparse)),
                       .config = b.config,
                       .heads_q = b.shape.heads_q,
                       .scale = scale_of(b.shape),
                       .q = q.data(),
                       .o = o.data()});
      needed = std::max(needed, attention_workspace_bytes(b.backend, steps.back()));
    }
    const std::span<std::byte> workspace = INFLLM_TRY(scratch.get(b.backend, needed));
    const Timing all = INFLLM_TRY(time_steps(b.backend, b.options.repetitions, [&]() -> Status {
      for (const AttentionParams& step : steps) INFLLM_TRY(attention(b.backend, step, workspace));
      return {};
    }));
    return all * (1.0 / count);
  };
  const std::string note = fmt::format("one token a sequence, {} layers in turn", count);
  const Timing dense = INFLLM_TRY(time_decode(false));
  INFLLM_TRY(report(
      b, {.name = "dense.decode", .timing = dense, .bytes = bytes.dense * batch, .note = note}));
  return report(b, {.name = "attention.decode",
                    .timing = INFLLM_TRY(time_decode(true)),
                    .bytes = bytes.sparse * batch,
                    .dense = dense,
                    .note = note});
}

Status run(const Options& options) {
  const auto* shape = std::ranges::find(kShapes, options.shape, &AttentionShape::name);
  if (shape == std::end(kShapes)) {
    return invalid_argument(
        fmt::format("no shape \"{}\"; choose minicpm4-0.5b or minicpm4.1-8b", options.shape));
  }
  Bench b{.options = options, .backend = INFLLM_TRY(open_backend(options.device)), .shape = *shape};
  if (b.backend.kernels->synchronize == nullptr) {
    return invalid_argument(
        fmt::format("{} is no device; attention_bench measures hosts", b.backend.name));
  }
  b.peak = INFLLM_TRY(device_peak(b.backend));
  fmt::print("{}, {}, {}: {:.0f} TFLOP/s, {:.0f} GB/s\n", b.backend.name, shape->name,
             options.input, b.peak.flops / 1e12, b.peak.bandwidth / 1e9);
  for (const std::int64_t tokens : options.tokens) {
    if (options.mode == "prefill") {
      INFLLM_TRY(run_prefill(b, tokens));
      continue;
    }
    if (options.mode == "backward") {
      INFLLM_TRY(run_backward(b, tokens));
      continue;
    }
    for (const std::int32_t batch : options.batch) INFLLM_TRY(run_decode(b, tokens, batch));
  }
  return {};
}

}  // namespace
}  // namespace infllm::bench

int main(int argc, char** argv) {
  infllm::bench::Options o;
  CLI::App app("Attention of one layer on a device");
  app.add_option("--device", o.device, "cuda, cuda:1, cuda:0:sm80, ...");
  app.add_option("--shape", o.shape, "minicpm4-0.5b or minicpm4.1-8b");
  app.add_option("--mode", o.mode)->check(CLI::IsMember({"prefill", "decode", "backward"}));
  app.add_option("--input", o.input)
      ->check(
          CLI::IsMember({"random", "correlated-0.9", "correlated-0.8", "correlated-0.7", "trace"}));
  app.add_option("--tokens", o.tokens)->delimiter(',')->check(CLI::Range(64, 1 << 24));
  app.add_option("--batch", o.batch, "sequences, of decode")->delimiter(',');
  app.add_option("--dense-limit", o.dense_limit, "longest prompt that is measured densely too");
  app.add_option("--repetitions", o.repetitions)->check(CLI::Range(1, 1000));
  app.add_option("--trace-model", o.trace.model, "of --input trace: a checkpoint folder,");
  app.add_option("--trace-text", o.trace.text, "a text that it reads,");
  app.add_option("--trace-layer", o.trace.layer, "and the layer that selects");
  app.add_option("--output", o.output, "append JSON lines to this file");
  CLI11_PARSE(app, argc, argv);
  const infllm::Status status = infllm::bench::run(o);
  if (!status.ok()) fmt::print(stderr, "device_bench: {}\n", status.message());
  return status.ok() ? 0 : 1;
}
