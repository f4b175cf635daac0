// SPDX-License-Identifier: Apache-2.0
//
// Test and bench of the CUDA columns' attend_backward by itself, for a GPU machine that has nothing
// but CUDA. After a first word "sm80" of the kernels for every device, after "sm90" of Hopper's
// own, in the cases that they cover; checks without such a word are of both.
//
//   backward_main check [NAME]    shapes against float64 on sampled rows and keys; every result is
//                                 taken twice and must repeat bit by bit; exit status 1 on a
//                                 failure
//   backward_main tiny            small shapes, each taken once, for compute-sanitizer
//   backward_main repeat [N]      100 (or N) runs of shapes with cut lists and of ragged batches,
//                                 dense and sparse: all the same bits
//   backward_main bench [correlated | random | dense] [d64] [gN] [kN] N...
//                                 milliseconds and useful TFLOP/s: neighbours share 0.8 of their
//                                 free blocks, draw their own, or see all; else all three; for
//                                 dimension 64 instead of 128, for groups of N heads instead of
//                                 16, for N KV heads instead of 2
//   backward_main align N...      milliseconds of the selection-alignment loss of the last 512 rows
#include "infllm/backend/cuda/align/align.h"
#include "infllm/backend/cuda/backward/attend_backward.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm80/attend.h"
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_backward.h"
#include "tests/cuda/backward_judge.cuh"
#include "tests/cuda/prefill_cases.h"

namespace infllm::cuda {
namespace {

bool is_hopper(const Backend& backend) { return backend.name.ends_with("sm90"); }

Status run_backward(const Backend& backend, const AttendBackwardParams& p,
                    std::span<std::byte> workspace) {
  return is_hopper(backend) ? sm90::attend_backward(backend, p, workspace)
                            : backward::attend_backward(backend, p, workspace);
}

std::size_t backward_bytes(const Backend& backend, const AttendBackwardParams& p) {
  return is_hopper(backend) ? sm90::attend_backward_bytes(backend, p)
                            : backward::attend_backward_bytes(backend, p);
}

// Of one run, on the device.
template <typename T>
struct Differentiated {
  Differentiated(const Backend& backend, const Bed<T>& bed)
      : q(bed.rig.queries.size()), k(bed.key_count()), v(bed.key_count()) {
    const AttendBackwardParams p = bed.params(q.data(), k.data(), v.data());
    with_workspace(backward_bytes(backend, p), [&](auto w) { return run_backward(backend, p, w); });
  }
  Gradients<T> host() const { return {q.host(), k.host(), v.host()}; }

  Array<T> q, k, v;
};

__global__ void compare_kernel(const std::uint16_t* a, const std::uint16_t* b, std::size_t count,
                               int* different) {
  const std::size_t at = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at < count && a[at] != b[at]) *different = 1;
}

template <typename T>
bool same(const Differentiated<T>& a, const Differentiated<T>& b) {
  const Array<int> different(std::vector<int>{0});
  const auto compare = [&](const Array<T>& x, const Array<T>& y) {
    if (x.size() == 0) return;
    compare_kernel<<<unsigned((x.size() + 255) / 256), 256>>>(
        reinterpret_cast<const std::uint16_t*>(x.data()),
        reinterpret_cast<const std::uint16_t*>(y.data()), x.size(), different.data());
    must(cudaGetLastError());
  };
  compare(a.q, b.q);
  compare(a.k, b.k);
  compare(a.v, b.v);
  return different.host()[0] == 0;
}

// Whether check(bed, "sparse") is true with lists and check(bed, "dense") without, a forward pass
// behind both, where the column covers the case.
template <typename T, typename Check>
bool check_both(const Backend& backend, const Case& c, Check&& check) {
  bool right = true;
  for (const int columns : {6, 0}) {
    const std::vector<int> lists =
        columns > 0 ? any_selection(Rig<T>(c), columns) : std::vector<int>();
    const Bed<T> bed(c, lists, columns);
    const AttendBackwardParams params = bed.params(nullptr, nullptr, nullptr);
    const AttendParams& forward = params.forward;
    if (is_hopper(backend) && !sm90::attends_backward(params)) continue;
    with_workspace(sm80::attend_bytes(backend, forward),
                   [&](auto w) { return sm80::attend(backend, forward, w); });
    right &= check(bed, columns > 0 ? "sparse" : "dense");
  }
  return right;
}

// `once`: without a second run that must repeat the first.
template <typename T>
bool check_case(const Backend& backend, const Case& c, bool once) {
  return check_both<T>(backend, c, [&](const Bed<T>& bed, const char* kind) {
    const Differentiated<T> there(backend, bed);
    const bool repeats = once || same(there, Differentiated<T>(backend, bed));
    const Gradients<T> first = there.host();
    const Judge<T> judge(bed);
    const Report q = check_queries(bed, judge, first.q);
    const Report k = check_keys(bed, judge, first);
    const bool ok = repeats && q.wrong == 0 && k.wrong == 0;
    std::printf("%-4s %-28s %-6s dQ %.3f (%d)  dK, dV %.3f (%d)%s\n", ok ? "ok" : "BAD",
                c.name.c_str(), kind, q.worst, q.wrong, k.worst, k.wrong,
                repeats ? "" : "  DOES NOT REPEAT");
    return ok;
  });
}

// Whether `runs` runs yield the bits of the first.
template <typename T>
bool check_repeats(const Backend& backend, const Case& c, int runs) {
  return check_both<T>(backend, c, [&](const Bed<T>& bed, const char* kind) {
    const Differentiated<T> first(backend, bed);
    int different = 0;
    for (int i = 1; i < runs; ++i) different += !same(first, Differentiated<T>(backend, bed));
    std::printf("%-4s %-28s %-6s %d of %d runs differ from the first\n",
                different == 0 ? "ok" : "BAD", c.name.c_str(), kind, different, runs);
    return different == 0;
  });
}

std::vector<Case> cases() {
  CaseList list({.config = SparseConfig{.dense_len = -1},
                 .heads_kv = 2,
                 .group = 4,
                 .dim = 64,
                 .spans = ragged_spans()});
  list.add_shapes({1, 2, 7, 16, 32, 40}, [](Case&) {});
  list.add_edges();
  const auto add = [&](const char* name, auto change) { list.add(name, change); };
  add("cut lists", [](Case& c) {
    c.group = 8;
    c.dim = 128;
    c.spans = {{0, 5000}, {100, 2400, false}, {0, 2300}};
  });
  add("one long, many short", [](Case& c) {
    c.group = 8;
    c.spans = {{0, 3000, false}};
    for (int i = 0; i < 200; ++i) c.spans.push_back({0, 1 + i % 5});
  });
  return std::move(list.cases);
}

// Ragged ones in which many thread blocks add to one sum, or several do to a cut list's.
std::vector<Case> repeated_cases() {
  std::vector<Case> list = cases();
  std::erase_if(list, [](const Case& c) {
    return c.name != "g7 d64 bf16" && c.name != "g16 d128 bf16" && c.name != "cut lists" &&
           c.name != "one long, many short";
  });
  CaseList longer({.config = SparseConfig{.dense_len = -1},
                   .heads_kv = 2,
                   .spans = {{0, 4000}, {700, 5200}, {0, 1500}, {300, 333}, {64, 64}, {0, 1}}});
  longer.add("longer g16 d128", [](Case& c) { c.group = 16, c.dim = 128; });
  longer.add("longer g8 d64", [](Case& c) { c.group = 8, c.dim = 64; });
  std::move(longer.cases.begin(), longer.cases.end(), std::back_inserter(list));
  return list;
}

// The first block, 33 local ones, and others of which a token keeps each with probability `keep`.
std::vector<int> correlated_selection(int tokens, int heads, int columns, double keep) {
  constexpr int kLocal = 33;
  std::vector<int> selection(std::size_t(heads) * tokens * columns, -1);
  parallel(heads, [&](int g) {
    Random random{0x9e3779b97f4a7c15ull + std::uint64_t(g)};
    std::vector<int> free;
    std::vector<char> taken(tokens / 64 + 1);
    for (int t = 0; t < tokens; ++t) {
      int* row = selection.data() + (std::size_t(g) * tokens + t) * columns;
      const int own = t / 64;
      const int candidates = own - kLocal;  // blocks 1 .. candidates
      const int count = std::min(columns - kLocal - 1, std::max(0, candidates));
      std::erase_if(free, [&](int b) {
        const bool drop = count < candidates && random.below(1000) >= int(keep * 1000);
        if (drop) taken[b] = 0;
        return drop;
      });
      while (int(free.size()) < count) {
        const int b = 1 + random.below(candidates);
        if (taken[b]) continue;
        taken[b] = 1;
        free.push_back(b);
      }
      std::sort(free.begin(), free.end());
      int at = 0;
      row[at++] = 0;
      for (const int b : free) row[at++] = b;
      for (int b = std::max(1, own - kLocal + 1); b <= own; ++b) row[at++] = b;
    }
  });
  return selection;
}

// `keep`: the share of a token's free blocks that its neighbour has too; below 0: dense.
void bench(const Backend& backend, const Case& shape, int tokens, double keep) {
  using T = __nv_bfloat16;
  constexpr int kColumns = 96;
  const bool sparse = keep >= 0;
  Case c = shape;
  c.spans = {{0, tokens}};
  const std::vector<int> lists =
      sparse ? correlated_selection(tokens, c.heads_kv, kColumns, keep) : std::vector<int>();
  const Bed<T> bed(c, lists, sparse ? kColumns : 0);
  const cudaStream_t stream = device_of(backend).stream;
  const Array<T> q(bed.rig.queries.size()), k(bed.key_count()), v(bed.key_count());
  const AttendBackwardParams p = bed.params(q.data(), k.data(), v.data());
  const bool fits = is_hopper(backend) && sm90::attends(p.forward);
  const auto attend = fits ? sm90::attend : sm80::attend;
  const auto attend_bytes = fits ? sm90::attend_bytes : sm80::attend_bytes;
  const std::size_t bytes = backward_bytes(backend, p);
  const Array<std::byte> workspace(std::max(bytes, attend_bytes(backend, p.forward)));
  const std::span<std::byte> w(workspace.data(), workspace.size());
  const double forward = median_milliseconds(stream, [&] { must(attend(backend, p.forward, w)); });
  const double back = median_milliseconds(stream, [&] { must(run_backward(backend, p, w)); });
  double pairs = 0;
  for (int t = 0; t < tokens; ++t) {
    pairs += sparse && t / 64 + 1 > kColumns ? (kColumns - 1) * 64 + t % 64 + 1 : t + 1;
  }
  const double flops = 4.0 * pairs * c.heads_kv * c.group * c.dim;
  const std::string kind = sparse ? "sparse, kept " + std::to_string(keep).substr(0, 4) : "dense";
  std::printf(
      "%7d %-17s forward %8.3f ms (%3.0f TF)  backward %8.3f ms (%3.0f TF)  workspace %.0f MB\n",
      tokens, kind.c_str(), forward, flops / forward * 1e-9, back, 2.5 * flops / back * 1e-9,
      double(bytes) * 1e-6);
  std::fflush(stdout);
}

// The selection-alignment loss of the last `rows` tokens.
void bench_align(const Backend& backend, int tokens, int rows) {
  using T = __nv_bfloat16;
  const Case c{.name = "bench",
               .config = SparseConfig{},
               .heads_kv = 2,
               .group = 16,
               .dim = 128,
               .spans = {{0, tokens}}};
  const Rig<T> rig(c);
  std::vector<int> list(rows);
  std::iota(list.begin(), list.end(), tokens - rows);
  const Array<int> list_there(list);
  const std::size_t blocks = std::size_t(2) * rows * ((tokens + 63) / 64);
  const Array<float> loss(std::vector<float>(2 * rows, 1.0f)), norms(32 * rows), scores(blocks);
  const Array<std::int32_t> windows(blocks);
  const Array<T> grad_q(std::size_t(rows) * 32 * 128), grad_k(std::size_t(tokens) * 2 * 128);
  const ScoreParams score = rig.score_params(nullptr);
  const AlignParams p{.pages = score.pages,
                      .batch = score.batch,
                      .config = score.config,
                      .heads_q = score.heads_q,
                      .scale = score.scale,
                      .q = score.q,
                      .rows = list_there.data(),
                      .num_rows = rows,
                      .loss = loss.data(),
                      .norms = norms.data(),
                      .grad_scores = scores.data(),
                      .windows = windows.data()};
  const AlignBackwardParams b{
      .forward = p, .grad_loss = loss.data(), .grad_q = grad_q.data(), .grad_k = grad_k.data()};
  const std::size_t there = align::align_bytes(backend, p);
  const std::size_t back = align::align_backward_bytes(backend, b);
  const Array<std::byte> workspace(std::max(there, back));
  const std::span<std::byte> w(workspace.data(), workspace.size());
  const cudaStream_t stream = device_of(backend).stream;
  const double forward = median_milliseconds(stream, [&] { must(align::align(backend, p, w)); });
  const double backward =
      median_milliseconds(stream, [&] { must(align::align_backward(backend, b, w)); });
  std::printf("%7d align of %d rows: forward %.3f ms (%.0f MB)  backward %.3f ms (%.0f MB)\n",
              tokens, rows, forward, double(there) * 1e-6, backward, double(back) * 1e-6);
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "";
  const bool one_column = first == "sm80" || first == "sm90";
  argc -= one_column;
  argv += one_column;
  Backend backend{.name = first == "sm90" ? "cuda:0:sm90" : "cuda:0:sm80"};
  auto device = open_device(0);
  must(device.status());
  backend.state = device.value();
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "bench") {
    std::vector<double> kept = {0.8, 0, -1};
    Case shape{.name = "bench", .heads_kv = 2, .group = 16, .dim = 128};
    for (int i = 2; i < argc; ++i) {
      const std::string word = argv[i];
      if (word == "correlated") kept = {0.8};
      if (word == "random") kept = {0};
      if (word == "dense") kept = {-1};
      if (word[0] == 'g') shape.group = std::atoi(word.c_str() + 1);
      if (word[0] == 'k') shape.heads_kv = std::atoi(word.c_str() + 1);
      if (word == "d64") shape.dim = 64;
      const int tokens = std::atoi(argv[i]);
      for (const double keep : kept) {
        if (tokens > 0) bench(backend, shape, tokens, keep);
      }
    }
    return 0;
  }
  if (mode == "align") {
    for (int i = 2; i < argc; ++i) bench_align(backend, std::atoi(argv[i]), 512);
    return 0;
  }
  const bool tiny = mode == "tiny", repeat = mode == "repeat";
  const int runs = argc > 2 ? std::atoi(argv[2]) : 100;
  const char* wanted = argc > 2 && !repeat ? argv[2] : nullptr;
  const std::vector<Case> list = tiny     ? tiny_cases(SparseConfig{.dense_len = -1})
                                 : repeat ? repeated_cases()
                                          : cases();
  std::vector<std::string> columns = {backend.name};
  if (!one_column && device.value()->capability == 90) columns.push_back("cuda:0:sm90");
  int bad = 0;
  for (const std::string& column : columns) {
    backend.name = column;
    std::printf("%s\n", column.c_str());
    bad += count_failures(list, wanted, [&]<typename T>(const Case& c, T) {
      return repeat ? check_repeats<T>(backend, c, runs) : check_case<T>(backend, c, tiny);
    });
  }
  std::printf("%d cases failed\n", bad);
  return bad == 0 ? 0 : 1;
}

}  // namespace
}  // namespace infllm::cuda

int main(int argc, char** argv) { return infllm::cuda::run(argc, argv); }
