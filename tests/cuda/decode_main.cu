// SPDX-License-Identifier: Apache-2.0
//
// The decode rows of the CUDA columns by themselves: every result against float64, then times.
//
//   decode_main check   exits with 1 if anything is off; a line for each shape
//   decode_main tiny    small shapes, once and without graphs, for compute-sanitizer
//   decode_main time    microseconds of one layer, out of a graph of several layers with caches of
//                       their own, and the bytes that the algorithm must read over that time
//   decode_main time 16 128 64 32dense ...
//                       of batches and thousands of tokens
#include <cstring>
#include <functional>
#include <tuple>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "tests/cuda/decode_case.cuh"
#include "tests/cuda/decode_reference.cuh"
#include "tests/cuda/shard.h"

namespace infllm::decode_check {
namespace {

using cuda::Device;

enum class Way { kPhases, kClusters, kFused };  // fused: score_select and attend in one launch
std::string_view name_of(Way way) {
  return way == Way::kPhases ? "phases  " : way == Way::kClusters ? "clusters" : "fused   ";
}

// Both rows of one step.
struct Steps {
  explicit Steps(Way one) : way(one), clusters(one == Way::kClusters) {}

  static SelectAttendParams both(const Case& c, int layer) {
    return {c.score_select(layer), c.attend(layer, false)};
  }
  bool covers(const Backend& backend, const Case& c) const {
    return way != Way::kFused ||
           (!c.shape.dense && cuda::decode::select_attends(backend, both(c, 0)));
  }
  std::size_t bytes(const Backend& backend, const Case& c) const {
    if (way == Way::kFused) return 256;
    return cuda::decode::score_select_bytes(backend, c.score_select(0)) +
           cuda::decode::attend_bytes(backend, c.attend(0, false)) + 256;
  }
  void run(const Backend& backend, const Case& c, int layer, bool early,
           std::span<std::byte> work) const {
    if (way == Way::kFused) {
      must(cuda::decode::select_attend(backend, both(c, layer), work));
      return;
    }
    score(backend, c, layer, work);
    attend(backend, c, layer, early, work);
  }
  void score(const Backend& backend, const Case& c, int layer, std::span<std::byte> work) const {
    if (c.shape.dense) return;
    must(clusters ? cuda::decode::score_select_in_clusters(backend, c.score_select(layer), work)
                  : cuda::decode::score_select_in_phases(backend, c.score_select(layer), work));
  }
  void attend(const Backend& backend, const Case& c, int layer, bool early,
              std::span<std::byte> work) const {
    must(clusters ? cuda::decode::attend_in_clusters(backend, c.attend(layer, early), work)
                  : cuda::decode::attend_in_splits(backend, c.attend(layer, early), work));
  }

  Way way;
  bool clusters;
};

class Graph {
 public:
  Graph(const Backend& backend, const std::function<void()>& body)
      : stream_(cuda::device_of(backend).stream) {
    cudaGraph_t graph = nullptr;
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    body();
    must(cudaStreamEndCapture(stream_, &graph));
    must(cudaGraphInstantiate(&executable_, graph, 0));
    must(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  void replay() const { must(cudaGraphLaunch(executable_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

struct Outputs {
  explicit Outputs(const Case& c)
      : selection(c.selection.host()), o(c.o.host()), lse(c.lse.host()) {}
  bool same(const Outputs& other) const {
    return selection == other.selection && o == other.o &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
  std::vector<std::int32_t> selection;
  std::vector<std::uint16_t> o;
  std::vector<float> lse;
};

// Within the budget of float64; and unless `once`, eager twice and from a graph twice agree bit by
// bit.
bool check(const Backend& backend, const Shape& shape, bool once) {
  Case c(shape);
  const Reference reference(c);
  const cudaStream_t stream = cuda::device_of(backend).stream;
  bool good = true;
  for (const auto& [way, early] : {std::tuple{Way::kClusters, true},
                                   {Way::kClusters, false},
                                   {Way::kPhases, true},
                                   {Way::kFused, false}}) {
    const Steps steps(way);
    if (!steps.covers(backend, c)) continue;
    Array<std::byte> memory(steps.bytes(backend, c));
    const std::span<std::byte> work(memory.get(), memory.size());
    const auto run = [&, early = early] { steps.run(backend, c, 0, early, work); };
    const auto fresh = [&](const std::function<void()>& body) {
      c.o.poison();
      c.lse.poison();
      c.selection.poison();
      memory.poison();
      must(cudaDeviceSynchronize());
      body();
      must(cudaStreamSynchronize(stream));
      return Outputs(c);
    };
    const Outputs eager = fresh(run);
    const Verdict v = reference.judge();
    const auto repeats = [&] {
      bool same = fresh(run).same(eager);
      same &= fresh([&] {
                must(cudaMemset(memory.get(), 0, memory.size()));  // looks like good news
                must(cudaDeviceSynchronize());
                run();
              }).same(eager);
      const Graph graph(backend, run);
      same &= fresh([&] { graph.replay(); }).same(eager);
      same &= fresh([&] {
                graph.replay();
                graph.replay();
              }).same(eager);
      return same;
    };
    const bool same = once || repeats();
    const bool ok = v.good() && same;
    good &= ok;
    std::printf(
        "%s %-28s %s%s rows %3d wrong %d (other ties %d) o wrong %d (%.2f) lse wrong %d%s%s%s\n",
        ok ? "ok  " : "FAIL", shape.name.c_str(), name_of(way).data(), early ? " early" : "      ",
        v.selection_rows, v.selection_wrong, v.selection_differs, v.outputs_wrong, v.worst,
        v.lse_wrong, same ? "" : " NOT REPEATABLE", v.first.empty() ? "" : ": ", v.first.c_str());
    std::fflush(stdout);
  }
  return good;
}

// A budget of 6 blocks, 2 of them local before the own one; always sparse.
SparseConfig small_config() {
  SparseConfig config;
  config.window_size = 128;
  config.topk = 4;
  config.dense_len = -1;
  return config;
}

std::vector<Shape> shapes(bool tiny) {
  const std::vector<std::int32_t> edges = {1,   15,  16,  17,  31,  32,  33,   63,   64,   65,
                                           0,   127, 128, 129, 191, 192, 193,  383,  384,  385,
                                           386, 399, 400, 447, 448, 449, 1000, 2047, 2048, 2049};
  const std::vector<std::int32_t> few = {1, 64, 0, 129, 385, 1000};
  std::vector<Shape> all;
  const auto add = [&](Shape s, std::string name) {
    s.name = std::move(name);
    all.push_back(std::move(s));
  };
  if (tiny) {
    add({.lengths = {385, 1000}, .heads_q = 8, .config = small_config()}, "tiny_few");
    add({.lengths = few, .heads_q = 8, .config = small_config()}, "tiny_d128");
    add({.lengths = few,
         .heads_q = 2,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "tiny_d64_f16");
    add({.lengths = few, .heads_q = 8, .dense = true}, "tiny_dense");
    return all;
  }
  for (const int group : {1, 2, 4, 7, 8, 16, 32}) {
    add({.lengths = edges, .heads_q = 2 * group, .config = small_config()},
        "edges_g" + std::to_string(group) + "_d128");
    add({.lengths = edges,
         .heads_q = group,
         .heads_kv = 1,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "edges_g" + std::to_string(group) + "_d64_f16");
  }
  add({.lengths = edges, .heads_q = 48, .heads_kv = 1, .dense = true}, "edges_dense_g48");
  add({.lengths = edges, .heads_q = 8, .dense = true}, "edges_dense");
  Shape s{.lengths = edges, .heads_q = 16, .config = small_config()};
  s.content = Content::kZeroQueries;
  add(s, "edges_zero_queries");
  s.content = Content::kRepeatedKeys;
  add(s, "edges_ties");
  s.config.score_rounding = ScoreRounding::kNone;
  add(s, "edges_ties_unrounded");
  s.content = Content::kNatural;
  add(s, "edges_unrounded");
  s.config.lse_source = LseSource::kFine;
  add(s, "edges_fine_lse");
  s = {.lengths = edges, .heads_q = 16, .config = small_config()};
  s.config.legacy_window = true;
  add(s, "edges_legacy_window");
  s.config = small_config();
  s.config.init_blocks = 0;
  add(s, "edges_no_sink");
  s.config.init_blocks = 5;
  add(s, "edges_5_sinks");
  s.config.init_blocks = 9;  // more forced blocks than the budget holds
  add(s, "edges_9_sinks");
  s.config = small_config();
  s.config.window_size = 0;
  add(s, "edges_no_window");
  s.config.topk = 1;
  add(s, "edges_budget_1");
  // Few rows, so that many thread blocks share one.
  for (const int group : {1, 4, 7, 16}) {
    for (const auto& lengths :
         {std::vector<std::int32_t>{385}, {449, 2049}, {0, 64, 33, 400}, {31, 6209, 1}}) {
      add({.lengths = lengths, .heads_q = 2 * group, .config = small_config()},
          "few_" + std::to_string(lengths.size()) + "_g" + std::to_string(group));
    }
    add({.lengths = {3000, 20001},
         .heads_q = group,
         .heads_kv = 1,
         .head_dim = 64,
         .dtype = DType::kF16,
         .config = small_config()},
        "few_g" + std::to_string(group) + "_d64_f16");
  }
  s = {.lengths = {9000, 500, 40000}, .heads_q = 8, .config = small_config()};
  s.config.lse_source = LseSource::kFine;
  add(s, "few_fine_lse");
  s.config = small_config();
  s.config.init_blocks = 0;
  s.config.legacy_window = true;
  add(s, "few_no_sink");
  s.content = Content::kRepeatedKeys;
  add(s, "few_ties");
  s = {.lengths = {9000, 500, 40000}};
  s.config.dense_len = 8192;
  add(s, "few_mixed");
  // The released numbers.
  s = {.lengths = {6143, 6144, 6145, 6208, 6209, 8191, 8192, 8193, 300, 0, 12345, 16384, 31000}};
  add(s, "released");
  s.config.dense_len = 8192;
  s.max_kv_length = 131072;
  add(s, "released_in_a_large_graph");
  s.lengths = {70001};
  add(s, "released_one");
  s.lengths = {66000, 131072, 9000};
  s.max_kv_length = 0;
  add(s, "released_three");
  s.lengths = {40001};
  s.dense = true;
  add(s, "dense_40k");
  s.lengths.assign(40, 0);
  for (int i = 0; i < 40; ++i) s.lengths[i] = 1 + 997 * i % 4967;
  add(s, "dense_ragged_40");
  s.dense = false;
  s.config.dense_len = 4000;
  add(s, "mixed_ragged_40");
  s.lengths.assign(150, 0);
  for (int i = 0; i < 150; ++i) s.lengths[i] = 1 + 997 * i % 4967;
  s.config = small_config();
  s.heads_q = 8;
  add(s, "ragged_150");
  return all;
}

// Median microseconds of a layer out of graphs of all layers.
double time(const Backend& backend, const Case& c, const std::function<void(int)>& layer) {
  const cudaStream_t stream = cuda::device_of(backend).stream;
  const int layers = static_cast<int>(c.pools.size());
  const Graph graph(backend, [&] {
    for (int i = 0; i < 32; ++i) layer(i % layers);
  });
  return 1000.0 * cuda::milliseconds(stream, 2, 11, [&] { graph.replay(); })[5] / 32;
}

void report(const Backend& backend, int batch, int context, bool dense, Way way) {
  const double cache = 1062.5 * context * batch;  // of a layer
  Shape s{.lengths = std::vector<std::int32_t>(batch, context), .dense = dense};
  s.layers = std::clamp(static_cast<int>(30e9 / cache), 2, 32);
  const Case c(s);
  const Steps steps(way);
  if (!steps.covers(backend, c)) return;
  Array<std::byte> memory(steps.bytes(backend, c));
  const std::span<std::byte> work(memory.get(), memory.size());
  const auto score = [&](int i) { steps.score(backend, c, i, work); };
  const double pooled = dense ? 0 : 40.0 * context * batch;
  const double keys = (dense ? 1024.0 * context : 1024.0 * 64 * std::min(96, context / 64)) * batch;
  const auto line = [&](const char* what, double us, double bytes) {
    std::printf("  %s %8.2f us (%4.2f TB/s, %2.0f%%)", what, us, bytes / us * 1e-6,
                100 * bytes / us * 1e-6 / 4.3);
  };
  std::printf("batch %3d x %4dK %s %s", batch, context / 1024, dense ? "dense " : "sparse",
              name_of(way).data());
  if (!dense && way != Way::kFused) {
    line("score_select", time(backend, c, score), pooled);
    line("attend", time(backend, c, [&](int i) { steps.attend(backend, c, i, false, work); }),
         keys);
    line("late",
         time(backend, c,
              [&](int i) {
                score(i);
                steps.attend(backend, c, i, false, work);
              }),
         pooled + keys);
  }
  line("layer", time(backend, c, [&](int i) { steps.run(backend, c, i, !dense, work); }),
       pooled + keys);
  std::printf("\n");
  std::fflush(stdout);
}

int run(const std::vector<std::string>& words) {
  const std::string what = words.empty() ? std::string("check") : words[0];
  auto device = cuda::open_device(0);
  if (!device.ok()) must(device.status());
  Backend backend{.name = "cuda:0"};
  backend.state = device.value();
  if (what == "time" && words.size() > 1) {
    for (std::size_t i = 1; i + 1 < words.size(); i += 2) {
      report(backend, std::stoi(words[i]), 1024 * std::stoi(words[i + 1]),
             words[i + 1].ends_with("dense"), Way::kClusters);
      report(backend, std::stoi(words[i]), 1024 * std::stoi(words[i + 1]),
             words[i + 1].ends_with("dense"), Way::kFused);
    }
    return 0;
  }
  if (what == "time") {
    for (const auto& [batch, context] : {std::tuple{1, 8},
                                         {1, 32},
                                         {1, 128},
                                         {1, 512},
                                         {1, 1024},
                                         {4, 128},
                                         {16, 32},
                                         {16, 128},
                                         {64, 32},
                                         {64, 128},
                                         {256, 16}}) {
      report(backend, batch, 1024 * context, false, Way::kClusters);
      report(backend, batch, 1024 * context, false, Way::kFused);
    }
    report(backend, 1, 131072, false, Way::kPhases);
    report(backend, 16, 131072, false, Way::kPhases);
    for (const auto& [batch, context] :
         {std::tuple{1, 8}, {1, 32}, {1, 128}, {16, 8}, {16, 32}, {16, 128}, {64, 8}, {64, 32}}) {
      report(backend, batch, 1024 * context, true, Way::kClusters);
    }
    report(backend, 16, 32768, true, Way::kPhases);
    return 0;
  }
  bool good = true;
  const bool tiny = what == "tiny";
  for (const Shape& shape : shapes(tiny)) {
    if (cuda::next_is_mine()) good &= check(backend, shape, tiny);
  }
  std::printf("%s\n", good ? "all good" : "SOMETHING IS OFF");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace infllm::decode_check

int main(int argc, char** argv) {
  return infllm::decode_check::run(std::vector<std::string>(argv + 1, argv + argc));
}
