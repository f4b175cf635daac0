// SPDX-License-Identifier: Apache-2.0
//
// The linear layers of a model beside what the machine can do: prefill (cpu.gemm) over the
// arithmetic peak, decode (cpu.gemv) over the read bandwidth. A decode reads copies of its matrix
// in turn, more of them than the caches hold.
//
//   linear_bench --model minicpm4-0.5b --weights bf16 --output bench/results/cpu.jsonl
//   linear_bench --model minicpm4.1-8b --weights int8 --group-size 128 --tokens 1,8,512
//
// Each peak is measured next to the kernel it is compared with.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "bench/support/harness.h"
#include "bench/support/peak.h"
#include "infllm/backend/open.h"
#include "infllm/ops/kernels.h"

namespace infllm::bench {
namespace {

struct Matrix {
  std::string_view model;
  std::string_view name;
  std::int64_t outputs;
  std::int64_t inputs;
};

constexpr Matrix kMatrices[] = {
    {"minicpm4-0.5b", "qkv", 1280, 1024},      {"minicpm4-0.5b", "attention_out", 1024, 1024},
    {"minicpm4-0.5b", "gate_up", 8192, 1024},  {"minicpm4-0.5b", "down", 1024, 4096},
    {"minicpm4.1-8b", "qkv", 4608, 4096},      {"minicpm4.1-8b", "attention_out", 4096, 4096},
    {"minicpm4.1-8b", "gate_up", 32768, 4096}, {"minicpm4.1-8b", "down", 4096, 16384},
};

struct Options {
  std::string device = "cpu";
  std::string model = "minicpm4-0.5b";
  std::string weights = "bf16";
  std::int32_t group_size = 0;
  std::vector<std::int64_t> tokens = {1, 512};
  int threads = 0;
  int repetitions = 9;
  std::string output;
};

constexpr std::int64_t kColdBytes = std::int64_t{256} << 20;  // beyond any cache
constexpr std::int64_t kGemvTokens = 8;  // up to here the weights' bytes are the cost

WeightFormat format_of(const std::string& name) {
  if (name == "f32") return WeightFormat::kF32;
  return name == "int8" ? WeightFormat::kI8 : WeightFormat::kBF16;
}

// Uniform in [-1, 1), a few instructions each.
std::vector<float> noise(std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
  }
  return values;
}

double rounded(double value, double digits) { return std::round(value * digits) / digits; }

Json line_of(const Options& options, const Backend& backend, std::string_view name) {
  Json line = result_line(name, backend.name);
  line["shape"] = {{"threads", backend.pool->size()}};
  line["input"] = "random";
  if (name == "cpu.gemm" || name == "cpu.gemv") {
    line["shape"]["weights"] = options.weights;
    if (options.group_size > 0) line["shape"]["group_size"] = options.group_size;
  }
  return line;
}

struct Peaks {
  double flops = 0;
  double bandwidth = 0;
};

Status report(const Options& options, const Backend& backend, const Matrix& matrix,
              std::int64_t tokens, double bytes, const Timing& timing, const Peaks& peaks) {
  const bool gemv = tokens <= kGemvTokens;
  Json line = line_of(options, backend, gemv ? "cpu.gemv" : "cpu.gemm");
  line["shape"]["model"] = matrix.model;
  line["shape"]["matrix"] = matrix.name;
  line["shape"]["outputs"] = matrix.outputs;
  line["shape"]["inputs"] = matrix.inputs;
  line["shape"]["tokens"] = tokens;
  add_timing(line, timing);
  const double flops = 2.0 * static_cast<double>(tokens * matrix.outputs * matrix.inputs);
  const double rate = (gemv ? bytes : flops) / timing.median;
  const double share = rate / (gemv ? peaks.bandwidth : peaks.flops);
  line["tflops"] = rounded(flops / timing.median / 1e12, 1e4);
  if (gemv) line["gbps"] = rounded(rate / 1e9, 1e2);
  line["roofline"] = rounded(share, 1e3);
  fmt::print("{:<14} {:<14} {:>5} tokens {:>10.3f} ms {:>7.1f} {:<8} {:>5.1f}% of {:.1f}\n",
             matrix.model, matrix.name, tokens, timing.median * 1e3, rate / 1e9,
             gemv ? "GB/s" : "GFLOP/s", share * 100, (gemv ? peaks.bandwidth : peaks.flops) / 1e9);
  return append_line(options.output, line);
}

Status measure_matrix(const Options& options, const Backend& backend, const Matrix& matrix) {
  const std::vector<float> values = noise(matrix.outputs * matrix.inputs);
  const TensorView view =
      TensorView::matrix(values.data(), DType::kF32, matrix.outputs, matrix.inputs);
  std::vector<LinearWeight> copies;
  for (std::int64_t bytes = 0; bytes < kColdBytes; bytes += copies.back().bytes()) {
    copies.push_back(INFLLM_TRY(
        pack_linear(backend, std::span(&view, 1), format_of(options.weights), options.group_size)));
  }
  for (const std::int64_t tokens : options.tokens) {
    const std::vector<float> x = noise(tokens * matrix.inputs);
    std::vector<float> y(static_cast<std::size_t>(tokens * matrix.outputs));
    LinearParams params{.weight = &copies[0], .tokens = tokens, .x = x.data(), .y = y.data()};
    std::vector<std::byte> workspace(linear_workspace_bytes(backend, params));
    Status status;
    const bool gemv = tokens <= kGemvTokens;
    const std::size_t calls = gemv ? copies.size() : 1;
    const Peaks peaks = {.flops = gemv
                                      ? 0
                                      : (options.weights == "f32" ? peak_f32_flops(*backend.pool)
                                                                  : peak_bf16_flops(*backend.pool)),
                         .bandwidth = gemv ? read_bandwidth(backend) : 0};
    const Timing all = measure({.warmup = 1, .repetitions = options.repetitions}, [&] {
      for (std::size_t i = 0; i < calls && status.ok(); ++i) {
        params.weight = &copies[i];
        status = linear(backend, params, workspace);
      }
    });
    if (!status.ok()) return status;
    INFLLM_TRY(report(options, backend, matrix, tokens, static_cast<double>(copies[0].bytes()),
                      all * (1.0 / static_cast<double>(calls)), peaks));
  }
  return {};
}

// A peak as a line of its own: ms is the time of one unit of work, 1e9 operations or bytes.
Status report_peak(const Options& options, const Backend& backend, std::string_view name,
                   double rate) {
  Json line = line_of(options, backend, name);
  const double seconds = 1e9 / rate;
  add_timing(line, {seconds, seconds, seconds});
  if (name == "cpu.read_bandwidth") {
    line["gbps"] = rounded(rate / 1e9, 1e2);
  } else {
    line["tflops"] = rounded(rate / 1e12, 1e4);
  }
  line["note"] = "best of several attempts; ms is that of 1e9 operations or bytes";
  fmt::print("{:<20} {:.1f} G/s\n", name, rate / 1e9);
  return append_line(options.output, line);
}

Status run(const Options& options) {
  const Backend backend = INFLLM_TRY(open_backend(options.device, {.threads = options.threads}));
  INFLLM_TRY(report_peak(options, backend, "cpu.peak_bf16", peak_bf16_flops(*backend.pool)));
  INFLLM_TRY(report_peak(options, backend, "cpu.peak_f32", peak_f32_flops(*backend.pool)));
  INFLLM_TRY(report_peak(options, backend, "cpu.read_bandwidth", read_bandwidth(backend)));
  for (const Matrix& matrix : kMatrices) {
    if (matrix.model == options.model) {
      INFLLM_TRY(measure_matrix(options, backend, matrix));
    }
  }
  return {};
}

}  // namespace
}  // namespace infllm::bench

int main(int argc, char** argv) {
  infllm::bench::Options o;
  CLI::App app("Linear layers: prefill over the arithmetic peak, decode over the bandwidth");
  app.add_option("--device", o.device, "as open_backend() names it");
  app.add_option("--model", o.model)->check(CLI::IsMember({"minicpm4-0.5b", "minicpm4.1-8b"}));
  app.add_option("--weights", o.weights)->check(CLI::IsMember({"f32", "bf16", "int8"}));
  app.add_option("--group-size", o.group_size, "of int8; 0: one scale per output");
  app.add_option("--tokens", o.tokens, "up to 8 count bytes, more count operations")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 16));
  app.add_option("--threads", o.threads, "0: one per hardware thread");
  app.add_option("--repetitions", o.repetitions)->check(CLI::Range(1, 1000));
  app.add_option("--output", o.output, "append JSON lines to this file");
  CLI11_PARSE(app, argc, argv);
  const infllm::Status status = infllm::bench::run(o);
  if (!status.ok()) fmt::print(stderr, "linear_bench: {}\n", status.message());
  return status.ok() ? 0 : 1;
}
