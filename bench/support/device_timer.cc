// SPDX-License-Identifier: Apache-2.0
#include "bench/support/device_timer.h"

#include <algorithm>
#include <vector>

#include "bench/support/attention_data.h"
#include "infllm/ops/transformer.h"

namespace infllm::bench {
namespace {

constexpr double kFill = 5e-3;  // seconds of a measurement
constexpr int kMostReplays = 200;

}  // namespace

Result<Timing> time_steps(const Backend& backend, int repetitions,
                          const std::function<Status()>& body) {
  INFLLM_TRY(body());  // loads code and chooses algorithms, which cannot be recorded
  INFLLM_TRY(synchronize(backend));
  const Result<Graph> graph = record(backend, body);
  if (!graph.ok() && graph.status().code() != StatusCode::kUnsupported) return graph.status();
  const auto run = [&](int count) -> Result<double> {
    const double start = now_seconds();
    for (int i = 0; i < count; ++i) INFLLM_TRY(graph.ok() ? replay(backend, *graph) : body());
    INFLLM_TRY(synchronize(backend));
    return (now_seconds() - start) / count;
  };
  const double once = INFLLM_TRY(run(1));
  const int count = std::clamp(static_cast<int>(kFill / once), 1, kMostReplays);
  std::vector<double> seconds;
  for (int i = 0; i < repetitions; ++i) seconds.push_back(INFLLM_TRY(run(count)));
  return summarise(std::move(seconds));
}

Result<DevicePeak> device_peak(const Backend& backend) {
  constexpr std::int64_t kSize = 8192;
  constexpr std::int64_t kCopied = std::int64_t{1} << 30;
  DevicePeak peak;
  std::vector<float> numbers(static_cast<std::size_t>(kSize * kSize));
  Noise noise(1);
  for (float& number : numbers) number = noise.next();
  const TensorView matrix = TensorView::matrix(numbers.data(), DType::kF32, kSize, kSize);
  const LinearWeight weight =
      INFLLM_TRY(pack_linear(backend, std::span(&matrix, 1), WeightFormat::kBF16));
  const Buffer x = INFLLM_TRY(upload(backend, numbers));
  const Buffer y = INFLLM_TRY(allocate(backend, x.bytes()));
  const LinearParams product{.weight = &weight, .tokens = kSize, .x = x.data(), .y = y.data()};
  const std::size_t bytes = linear_workspace_bytes(backend, product);
  const Buffer workspace = INFLLM_TRY(allocate(backend, bytes));
  const Timing multiply = INFLLM_TRY(time_steps(backend, 9, [&] {
    return linear(backend, product, {workspace.data(), bytes});
  }));
  peak.flops = 2.0 * kSize * kSize * kSize / multiply.median;

  const Buffer from = INFLLM_TRY(allocate(backend, kCopied));
  const Buffer to = INFLLM_TRY(allocate(backend, kCopied));
  const std::int64_t element = size_of(DType::kBF16);
  const GatherParams copy{.count = kCopied / (kSize * element),
                          .width = kSize,
                          .row_stride = kSize,
                          .x = from.data(),
                          .y = to.data()};
  const Timing move = INFLLM_TRY(time_steps(backend, 9, [&] { return gather(backend, copy); }));
  peak.bandwidth = 2.0 * kCopied / move.median;
  return peak;
}

}  // namespace infllm::bench
