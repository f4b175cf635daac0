// SPDX-License-Identifier: Apache-2.0
#include "bench/support/peak.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bench/support/harness.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infllm::bench {
namespace {

constexpr int kAttempts = 7;  // the best one counts: others share the machine
constexpr std::int64_t kSteps = 2'000'000;
constexpr int kChains = 12;  // independent sums, to cover latency

// Runs kSteps steps of kChains instructions, returns the floating-point operations done.
using Burn = double (*)(float* sink);

double burn_portable(float* sink) {
  constexpr int kWidth = 64;
  float acc[kWidth] = {};
  for (std::int64_t i = 0; i < kSteps / 4; ++i) {
    for (int j = 0; j < kWidth; ++j) acc[j] = acc[j] * 0.999f + 1.0f;
  }
  for (const float x : acc) *sink += x;
  return 2.0 * kWidth * (kSteps / 4);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double burn_avx2(float* sink) {
  __m256 acc[kChains];
  for (__m256& x : acc) x = _mm256_setzero_ps();
  const __m256 a = _mm256_set1_ps(0.999f);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (__m256& x : acc) x = _mm256_fmadd_ps(x, a, a);
  }
  for (const __m256& x : acc) *sink += _mm256_cvtss_f32(x);
  return 2.0 * 8 * kChains * kSteps;
}

__attribute__((target("avx512f"))) double burn_avx512(float* sink) {
  __m512 acc[kChains];
  for (__m512& x : acc) x = _mm512_setzero_ps();
  const __m512 a = _mm512_set1_ps(0.999f);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (__m512& x : acc) x = _mm512_fmadd_ps(x, a, a);
  }
  for (const __m512& x : acc) *sink += _mm512_cvtss_f32(x);
  return 2.0 * 16 * kChains * kSteps;
}

__attribute__((target("avx512f,avx512bf16"))) double burn_bf16(float* sink) {
  __m512 acc[kChains];
  for (__m512& x : acc) x = _mm512_setzero_ps();
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (__m512& x : acc) x = _mm512_dpbf16_ps(x, a, a);
  }
  for (const __m512& x : acc) *sink += _mm512_cvtss_f32(x);
  return 4.0 * 16 * kChains * kSteps;
}
#endif

Burn best_f32() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return &burn_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &burn_avx2;
#endif
  return &burn_portable;
}

Burn best_bf16() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return &burn_bf16;
#endif
  return best_f32();
}

// Each thread is timed by itself, so a thread that starts late costs nothing.
double flops(ThreadPool& pool, Burn burn) {
  double best = 0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::vector<double> rate(static_cast<std::size_t>(pool.size()));
    std::vector<float> sink(rate.size() * 16);
    pool.parallel_for(pool.size(), [&](std::int64_t task, int) {
      const auto i = static_cast<std::size_t>(task);
      const double start = now_seconds();
      const double operations = burn(&sink[i * 16]);
      rate[i] = operations / (now_seconds() - start);
    });
    double total = 0;
    for (const double r : rate) total += r;
    best = std::max(best, total);
  }
  return best;
}

}  // namespace

double peak_f32_flops(ThreadPool& pool) { return flops(pool, best_f32()); }
double peak_bf16_flops(ThreadPool& pool) { return flops(pool, best_bf16()); }

double read_bandwidth(const Backend& backend) {
  ThreadPool& pool = *backend.pool;
  constexpr std::int64_t kWords = std::int64_t{64} << 20;  // 512 MiB
  constexpr std::int64_t kPiece = 1 << 17;                 // 1 MiB tasks
  const Result<Buffer> buffer = allocate(backend, kWords * sizeof(std::uint64_t));
  if (!buffer.ok()) return 0;
  auto* memory = buffer->as<std::uint64_t>();
  std::fill(memory, memory + kWords, 1);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(pool.size()) * 8);
  double best = 0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const double start = now_seconds();
    pool.parallel_for(kWords / kPiece, [&](std::int64_t task, int worker) {
      const std::uint64_t* from = memory + task * kPiece;
      std::uint64_t sum[8] = {};
      for (std::int64_t i = 0; i < kPiece; i += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += from[i + j];
      }
      for (const std::uint64_t s : sum) sums[static_cast<std::size_t>(worker) * 8] += s;
    });
    best = std::max(best, kWords * 8.0 / (now_seconds() - start));
  }
  volatile std::uint64_t keep = sums[0];
  static_cast<void>(keep);
  return best;
}

}  // namespace infllm::bench
