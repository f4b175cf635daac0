// SPDX-License-Identifier: Apache-2.0
//
// Test and benchmark of Hopper's score_select (infllm/backend/cuda/sm90) by itself.
//
//   sm90_score_select_main check [NAME]       every case, or those whose name has NAME in it; exit
//                                             status 1 if one fails
//   sm90_score_select_main tiny               small cases, for compute-sanitizer
//   sm90_score_select_main bench [TOKENS ...]
#include "tests/cuda/score_select_judge.cuh"
#include "tests/cuda/shard.h"
#include "tests/cuda/small_config.h"

namespace infllm::cuda {
namespace {

std::vector<Case> cases() {
  const SparseConfig small = small_config();
  SparseConfig released;
  released.dense_len = -1;
  const auto with = [](SparseConfig c, auto&& change) {
    change(c);
    return c;
  };
  std::vector<Case> list;
  // Lengths and histories at every edge of windows, blocks and tiles, prefilled whole and in part.
  const std::vector<int> lengths = {1,   15,  31,  32,  63,  64,  65,  127, 128, 383, 384,
                                    385, 447, 448, 449, 511, 512, 513, 700, 777, 1024};
  std::vector<int> parts;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    parts.push_back(i % 5 == 3 ? 0 : std::min(lengths[i], 1 + static_cast<int>(i) * 17));
  }
  for (const int group : {16, 8, 4, 2}) {
    for (const int dim : {128, 64}) {
      const std::string shape = text("g%d_d%d", group, dim);
      list.push_back({.name = "edges_" + shape,
                      .config = small,
                      .group = group,
                      .dim = dim,
                      .lengths = lengths,
                      .tokens = lengths,
                      .samples = 4000});
      list.push_back({.name = "parts_" + shape,
                      .config = small,
                      .group = group,
                      .dim = dim,
                      .lengths = lengths,
                      .tokens = parts,
                      .samples = 4000});
      list.push_back({.name = "released_" + shape,
                      .config = released,
                      .group = group,
                      .dim = dim,
                      .lengths = {9001},
                      .tokens = {9001}});
    }
  }
  std::vector<int> some_sparse(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) some_sparse[i] = i % 3 != 1;
  list.push_back({.name = "mixed",
                  .config = small,
                  .lengths = lengths,
                  .tokens = parts,
                  .sparse = some_sparse,
                  .samples = 4000});
  list.push_back({.name = "f16",
                  .config = small,
                  .dtype = DType::kF16,
                  .lengths = lengths,
                  .tokens = lengths,
                  .samples = 4000});
  list.push_back({.name = "released_f16",
                  .config = released,
                  .dtype = DType::kF16,
                  .lengths = {7777},
                  .tokens = {1777}});
  const auto variant = [&](const std::string& name, auto&& change) {
    list.push_back({.name = name,
                    .config = with(small, change),
                    .lengths = lengths,
                    .tokens = parts,
                    .samples = 4000});
    list.push_back({.name = name + "_long",
                    .config = with(released, change),
                    .lengths = {6500, 12345},
                    .tokens = {500, 2345}});
  };
  variant("fine", [](SparseConfig& c) { c.lse_source = LseSource::kFine; });
  variant("exact", [](SparseConfig& c) { c.score_rounding = ScoreRounding::kNone; });
  variant("legacy", [](SparseConfig& c) { c.legacy_window = true; });
  variant("no_sink", [](SparseConfig& c) { c.init_blocks = 0; });
  variant("two_sinks", [](SparseConfig& c) { c.init_blocks = 2; });
  variant("no_window", [](SparseConfig& c) { c.window_size = 0; });
  variant("no_window_fine", [](SparseConfig& c) {
    c.window_size = 0;
    c.lse_source = LseSource::kFine;
    c.score_rounding = ScoreRounding::kNone;
  });
  variant("topk_2", [](SparseConfig& c) { c.topk = 2; });
  variant("topk_128", [](SparseConfig& c) {
    c.topk = 128;
    c.window_size = 512;
  });
  for (const Content content : {Content::kZero, Content::kTies, Content::kExtreme}) {
    const char* names[] = {"", "zero", "ties", "extreme"};
    const std::string name = names[static_cast<int>(content)];
    list.push_back({.name = name,
                    .config = small,
                    .lengths = lengths,
                    .tokens = lengths,
                    .content = content,
                    .samples = 4000});
    list.push_back({.name = name + "_long",
                    .config = released,
                    .lengths = {20000},
                    .tokens = {1000},
                    .content = content});
    list.push_back({.name = name + "_g4",
                    .config = released,
                    .group = 4,
                    .lengths = {20000},
                    .tokens = {1000},
                    .content = content});
  }
  list.push_back({.name = "batch_long",
                  .config = released,
                  .lengths = {40000, 6144, 6145, 8193, 131},
                  .tokens = {300, 1000, 1000, 8193, 131}});
  list.push_back({.name = "one_head_chunk",
                  .config = released,
                  .heads_kv = 1,
                  .lengths = {65536 + 7},
                  .tokens = {129},
                  .correlation = 0.9f});
  list.push_back({.name = "eight_heads",
                  .config = released,
                  .heads_kv = 8,
                  .group = 4,
                  .dim = 64,
                  .lengths = {10000},
                  .tokens = {200}});
  list.push_back({.name = "million",
                  .config = released,
                  .lengths = {1048576},
                  .tokens = {100},
                  .samples = 20});
  return list;
}

template <typename T>
bool check_one(const Case& c) {
  Step<T> step(c);
  if (!step.covered()) {
    std::printf("%-20s not covered\n", c.name.c_str());
    return true;
  }
  Judge<T> judge(step);
  const std::string problem = judge.check();
  std::printf("%-4s %-20s %5d rows judged%s%s\n", problem.empty() ? "ok" : "BAD", c.name.c_str(),
              static_cast<int>(judge.judged()), problem.empty() ? "" : ": ", problem.c_str());
  std::fflush(stdout);
  return problem.empty();
}

// Every way through the kernel in few thread blocks.
std::vector<Case> tiny_cases() {
  std::vector<Case> list;
  const auto add = [&](const std::string& name, int group, int dim, DType dtype) {
    list.push_back({.name = "tiny_" + name,
                    .config = small_config(),
                    .heads_kv = 1,
                    .group = group,
                    .dim = dim,
                    .dtype = dtype,
                    .lengths = {1, 63, 385, 1024},
                    .tokens = {1, 9, 0, 21}});
  };
  for (const int group : {16, 8, 4, 2}) {
    const int dim = group == 16 || group == 4 ? 128 : 64;
    add(text("g%d_d%d", group, dim), group, dim, DType::kBF16);
  }
  add("f16", 16, 64, DType::kF16);
  add("fine", 16, 128, DType::kBF16);
  list.back().config.lse_source = LseSource::kFine;
  add("mixed", 16, 128, DType::kBF16);
  list.back().sparse = {1, 0, 1, 1};
  return list;
}

int check(const std::vector<Case>& chosen) {
  int failed = 0;
  int count = 0;
  for (const Case& c : chosen) {
    if (!next_is_mine()) continue;
    ++count;
    failed += !(c.dtype == DType::kBF16 ? check_one<__nv_bfloat16>(c) : check_one<__half>(c));
  }
  std::printf("%d of %d cases failed\n", failed, count);
  return failed != 0;
}

// Products that a token needs: its visible normalising windows, and those of its candidates.
double flops_of(const SparseConfig& config, int tokens, int heads, int dim) {
  double scores = 0;
  for (std::int64_t p = 0; p < tokens; ++p) {
    if (config.selects_all_at(p)) continue;
    scores += static_cast<double>(config.coarse_windows(p + 1) + 4 * config.first_local_block(p));
  }
  return 2.0 * dim * heads * scores;
}

// One JSON object a line; false if a sampled row is wrong.
bool bench(int tokens, int group, int dim, float correlation) {
  SparseConfig config;
  config.dense_len = -1;
  Step<__nv_bfloat16> step({.name = "bench",
                            .config = config,
                            .group = group,
                            .dim = dim,
                            .lengths = {tokens},
                            .tokens = {tokens},
                            .correlation = correlation});
  const std::vector<float> ms = step.measure();
  const double median = ms[ms.size() / 2];
  const std::string problem = Judge(step).check_some(16);
  std::printf(
      R"({"name": "score_select.forward", "backend": "sm90", "heads_q": %d, "heads_kv": 2, )"
      R"("head_dim": %d, "tokens": %d, "correlation": %.2f, "overlap": %.2f, "ms": %.3f, )"
      R"("ms_low": %.3f, "ms_high": %.3f, "tflops": %.0f, "workspace_mb": %.1f, "rows": "%s"})"
      "\n",
      2 * group, dim, tokens, correlation, step.overlap(), median, ms.front(), ms.back(),
      flops_of(config, tokens, 2 * group, dim) / median * 1e-9, step.workspace_bytes() * 1e-6,
      problem.empty() ? "ok" : problem.c_str());
  std::fflush(stdout);
  return problem.empty();
}

int run_main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check" || mode == "tiny") {
    const std::string part = argc > 2 ? argv[2] : "";
    std::vector<Case> chosen = mode == "tiny" ? tiny_cases() : cases();
    std::erase_if(chosen, [&](const Case& c) { return c.name.find(part) == std::string::npos; });
    return check(chosen);
  }
  std::vector<int> sizes;
  for (int i = 2; i < argc; ++i) sizes.push_back(std::stoi(argv[i]));
  if (sizes.empty()) sizes = {8192, 32768, 131072, 524288, 1048576};
  bool right = true;
  for (const int tokens : sizes) {
    for (const float correlation : {0.0f, 0.95f}) right &= bench(tokens, 16, 128, correlation);
    right &= bench(tokens, 8, 64, 0.95f);
  }
  return right ? 0 : 1;
}

}  // namespace

}  // namespace infllm::cuda

int main(int argc, char** argv) { return infllm::cuda::run_main(argc, argv); }
