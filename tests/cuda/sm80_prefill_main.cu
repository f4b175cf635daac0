// SPDX-License-Identifier: Apache-2.0
//
// Test and benchmark of the sm80 column's prefill rows (score, select, attend), by themselves.
//
//   sm80_prefill_main check [case]        every case; exit status 1 if one fails
//   sm80_prefill_main tiny                small cases, for compute-sanitizer
//   sm80_prefill_main bench [tokens ...]  32 query heads on 2 KV heads of dimension 128, bf16
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm80/attend.h"
#include "infllm/backend/cuda/sm80/score.h"
#include "infllm/backend/cuda/sm80/select.h"
#include "tests/cuda/prefill_cases.h"
#include "tests/cuda/small_config.h"

namespace infllm::cuda {
namespace {

template <typename T>
bool check_case(const Backend& backend, const Case& c) {
  const Rig<T> rig(c);
  const SelectParams sizes = rig.select_params(nullptr, nullptr);
  const std::size_t rows = std::size_t(c.heads_kv) * rig.batch.num_tokens;
  std::vector<int> selection;
  Report scored;
  int misplaced = 0;
  Array<int> chosen(rows * sizes.columns());
  if (rig.batch.any_sparse && !c.missing_pages) {
    Array<float> scores(rows * sizes.blocks());
    const ScoreParams p = rig.score_params(scores.data());
    with_workspace(sm80::score_bytes(backend, p),
                   [&](auto w) { return sm80::score(backend, p, w); });
    const std::vector<float> host = scores.host();
    scored = check_scores(rig, host);
    must(sm80::select(backend, rig.select_params(scores.data(), chosen.data()), {}));
    must(cudaDeviceSynchronize());
    selection = chosen.host();
    misplaced = check_selection(rig, host, selection);
  }
  Report attended[3];
  // The kernel's selection; any selection, with numbers that are no blocks; none.
  for (int round = 0; round < 3; ++round) {
    if (round == 0 && selection.empty()) continue;
    if (round == 1) selection = any_selection(rig, sizes.columns());
    if (round == 2) selection.clear();
    Array<int> given(selection);
    Array<T> o(rig.queries.size());
    Array<float> lse(std::size_t(rig.heads_q()) * rig.batch.num_tokens);
    const AttendParams p =
        rig.attend_params(o.data(), lse.data(), selection.empty() ? nullptr : given.data());
    with_workspace(sm80::attend_bytes(backend, p),
                   [&](auto w) { return sm80::attend(backend, p, w); });
    attended[round] = check_attention(rig, o.host(), lse.host(), selection, 40);
  }
  const int wrong =
      scored.wrong + misplaced + attended[0].wrong + attended[1].wrong + attended[2].wrong;
  std::printf(
      "%-4s %-34s score %.3f (%d) select (%d) sparse %.3f (%d) any %.3f (%d) dense %.3f (%d)\n",
      wrong == 0 ? "ok" : "BAD", c.name.c_str(), scored.worst, scored.wrong, misplaced,
      attended[0].worst, attended[0].wrong, attended[1].worst, attended[1].wrong, attended[2].worst,
      attended[2].wrong);
  return wrong == 0;
}

std::vector<Case> cases() {
  CaseList list(
      {.config = small_config(), .heads_kv = 2, .group = 4, .dim = 64, .spans = ragged_spans()});
  list.add_shapes({1, 2, 3, 4, 7, 8, 12, 16, 32}, [](Case& c) {
    c.heads_kv = c.group == 1 ? 8 : c.group == 32 ? 1 : 2;
  });
  list.add_edges();
  const auto add = [&](const char* name, auto change) { list.add(name, change); };
  add("budget edge", [](Case& c) {
    c.spans.clear();
    for (const int n : {383, 384, 385, 386, 447, 448, 449}) c.spans.push_back({n - 66, n});
  });
  add("legacy window", [](Case& c) { c.config.legacy_window = true; });
  add("fine lse", [](Case& c) { c.config.lse_source = LseSource::kFine; });
  add("no rounding", [](Case& c) { c.config.score_rounding = ScoreRounding::kNone; });
  add("no sink", [](Case& c) { c.config.init_blocks = 0; });
  add("no window", [](Case& c) { c.config.window_size = 0; });
  add("budget below forced", [](Case& c) { c.config.init_blocks = 3, c.config.topk = 1; });
  add("budget of one", [](Case& c) { c.config.window_size = 0, c.config.topk = 1; });
  add("many steps", [](Case& c) { c.group = 16, c.spans = {{4000, 4010}, {5000, 5003, false}}; });
  add("released, 40 sequences", [](Case& c) {
    c.config = SparseConfig{.dense_len = -1};
    c.group = 16;
    c.dim = 128;
    c.spans.assign(40, {6200, 6203});
    c.spans[0] = {6100, 6333};
    c.spans[38] = {8100, 9200};
  });
  add("many blocks", [](Case& c) {
    c.config = SparseConfig{.dense_len = -1};
    c.group = 16;
    c.dim = 128;
    c.heads_kv = 1;
    c.spans = {{299970, 300000}};
  });
  return std::move(list.cases);
}

// Tokens [length - tokens, length) of one sequence.
void bench(const Backend& backend, int length, int tokens, float correlation, int group, int dim) {
  using T = __nv_bfloat16;
  const Case c{.name = "bench",
               .config = SparseConfig{},
               .heads_kv = 2,
               .group = group,
               .dim = dim,
               .spans = {{length - tokens, length}},
               .correlation = correlation};
  const Rig<T> rig(c);
  const cudaStream_t stream = device_of(backend).stream;
  const SelectParams sizes = rig.select_params(nullptr, nullptr);
  const std::size_t rows = std::size_t(c.heads_kv) * tokens;
  Array<float> scores(rows * sizes.blocks());
  Array<int> chosen(rows * sizes.columns());
  Array<T> o(rig.queries.size());
  const ScoreParams score = rig.score_params(scores.data());
  const SelectParams select = rig.select_params(scores.data(), chosen.data());
  const AttendParams sparse = rig.attend_params(o.data(), nullptr, chosen.data());
  const AttendParams dense = rig.attend_params(o.data(), nullptr, nullptr);
  Array<std::byte> workspace(
      std::max(sm80::score_bytes(backend, score), sm80::attend_bytes(backend, sparse)));
  const std::span<std::byte> w(workspace.data(), workspace.size());
  const double score_ms =
      median_milliseconds(stream, [&] { must(sm80::score(backend, score, w)); });
  const double select_ms =
      median_milliseconds(stream, [&] { must(sm80::select(backend, select, {})); });
  const double sparse_ms =
      median_milliseconds(stream, [&] { must(sm80::attend(backend, sparse, w)); });
  const double dense_ms =
      median_milliseconds(stream, [&] { must(sm80::attend(backend, dense, w)); });
  double dense_keys = 0, sparse_keys = 0, windows = 0;
  for (int p = length - tokens; p < length; ++p) {
    dense_keys += p + 1;
    sparse_keys +=
        c.config.selects_all_at(p) ? p + 1 : (c.config.budget_blocks() - 1) * 64 + p % 64 + 1;
    windows += fine_windows(p + 1) + coarse_windows(p + 1);
  }
  // The union of eight neighbours' lists over one list.
  const std::vector<int> lists = chosen.host();
  double all = 0, one = 0;
  for (int first = tokens / 2 / 8 * 8; first < tokens / 2 / 8 * 8 + 80; first += 8) {
    std::vector<int> seen;
    for (int t = first; t < first + 8 && t < tokens; ++t) {
      for (int i = 0; i < sizes.columns(); ++i) {
        const int b = lists[std::size_t(t) * sizes.columns() + i];
        if (b >= 0) seen.push_back(b), one += 1.0 / 8;
      }
    }
    std::sort(seen.begin(), seen.end());
    all += double(std::unique(seen.begin(), seen.end()) - seen.begin());
  }
  const double per_key = 2.0 * dim * c.heads_kv * group;
  std::printf(
      "%7d +%6d G %2d D %3d r %.3f c(8) %.2f: score %8.3f ms (%3.0f TF)  select %7.3f ms  attend "
      "%8.3f ms (%3.0f TF)  dense %9.3f ms (%3.0f TF)\n",
      length - tokens, tokens, group, dim, correlation, all / one, score_ms,
      per_key * windows / score_ms / 1e9, select_ms, sparse_ms,
      2 * per_key * sparse_keys / sparse_ms / 1e9, dense_ms,
      2 * per_key * dense_keys / dense_ms / 1e9);
}

int run(int argc, char** argv) {
  Backend backend{.name = "cuda:0:sm80"};
  auto device = open_device(0);
  must(device.status());
  backend.state = device.value();
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check" || mode == "tiny") {
    const int bad = count_failures(
        mode == "tiny" ? tiny_cases(small_config()) : cases(), argc > 2 ? argv[2] : nullptr,
        [&]<typename T>(const Case& c, T) { return check_case<T>(backend, c); });
    std::printf("%d cases failed\n", bad);
    return bad == 0 ? 0 : 1;
  }
  for (int i = 2; i < argc; ++i) {
    const int tokens = std::atoi(argv[i]);
    bench(backend, tokens, tokens, 0.97f, 16, 128);
  }
  if (argc > 2) return 0;
  for (const float correlation : {0.985f, 0.97f, 0.0f}) {
    bench(backend, 32768, 32768, correlation, 16, 128);
    bench(backend, 131072, 8192, correlation, 16, 128);
    bench(backend, 32768, 32768, correlation, 8, 64);
  }
  for (const int group : {1, 2, 4, 7, 32}) bench(backend, 32768, 8192, 0.97f, group, 128);
  return 0;
}

}  // namespace
}  // namespace infllm::cuda

int main(int argc, char** argv) { return infllm::cuda::run(argc, argv); }
