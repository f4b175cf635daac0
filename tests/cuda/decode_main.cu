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
#include "infllm/backend/cuda/decode/row_stream.h"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "tests/cuda/decode_case.cuh"
#include "tests/cuda/decode_late.cuh"
#include "tests/cuda/decode_reference.cuh"
#include "tests/cuda/decode_shapes.cuh"
#include "tests/cuda/shard.h"

namespace infllm::decode_check {
namespace {

using cuda::Device;

// fused and stream: score_select and attend in one launch
enum class Way { kPhases, kClusters, kFused, kStream };
std::string_view name_of(Way way) {
  constexpr std::string_view kNames[] = {"phases  ", "clusters", "fused   ", "stream  "};
  return kNames[static_cast<int>(way)];
}

// Both rows of one step.
struct Steps {
  // settled: nobody but the kernel in front writes to the cache.
  Steps(Way one, bool is_settled)
      : way(one), clusters(one == Way::kClusters), settled(is_settled) {}

  SelectAttendParams both(const Case& c, int layer) const {
    return {c.score_select(layer), c.attend(layer, false), settled};
  }
  bool one_launch() const { return way == Way::kFused || way == Way::kStream; }
  bool covers(const Backend& backend, const Case& c) const {
    if (!one_launch()) return true;
    if (c.shape.dense) return false;
    return way == Way::kFused ? cuda::decode::select_attends(backend, both(c, 0))
                              : cuda::decode::streams_rows(backend, both(c, 0));
  }
  std::size_t bytes(const Backend& backend, const Case& c) const {
    if (one_launch()) return 256;
    return cuda::decode::score_select_bytes(backend, c.score_select(0)) +
           cuda::decode::attend_bytes(backend, c.attend(0, false)) + 256;
  }
  void run(const Backend& backend, const Case& c, int layer, bool early,
           std::span<std::byte> work) const {
    if (one_launch()) {
      must(way == Way::kFused ? cuda::decode::select_attend(backend, both(c, layer), work)
                              : cuda::decode::stream_rows(backend, both(c, layer), work));
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
  bool clusters, settled;
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
                                   {Way::kFused, false},
                                   {Way::kStream, false}}) {
    const Steps steps(way, false);
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
      if (!steps.one_launch()) return same;
      Newest newest(c);
      const Graph late(backend, [&] {
        newest.show_late(cuda::device_of(backend));
        Steps(steps.way, true).run(backend, c, 0, false, work);
      });
      newest.hide(cuda::device_of(backend));
      same &= fresh([&] { late.replay(); }).same(eager);
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
  const Steps steps(way, true);
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
  if (!dense && !steps.one_launch()) {
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
      for (const Way way : {Way::kClusters, Way::kFused, Way::kStream}) {
        report(backend, std::stoi(words[i]), 1024 * std::stoi(words[i + 1]),
               words[i + 1].ends_with("dense"), way);
      }
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
      for (const Way way : {Way::kClusters, Way::kFused, Way::kStream}) {
        report(backend, batch, 1024 * context, false, way);
      }
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
