// SPDX-License-Identifier: Apache-2.0
//
// Test and bench of Hopper's attend by itself, for a GPU machine that has nothing but CUDA.
//
//   sm90_attend_main check [NAME]    every shape, or those whose name has NAME in it, against
//                                    float64 on the host; exit status 1 on a failure
//   sm90_attend_main tiny            small shapes, once, for compute-sanitizer
//   sm90_attend_main time [CONFIG] [gG_dD] N...
//                                    dense and sparse at these lengths; one JSON object a line
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "infllm/backend/cuda/sm90/attend_launch.cuh"
#include "tests/cuda/shard.h"
#include "tests/cuda/sm90_attend_judge.cuh"

namespace infllm::cuda::testing {
namespace {

using namespace infllm::cuda::sm90;

// One way to run the operation.
struct Runner {
  const char* name;
  bool sparse;
  Status (*run)(const AttendParams&, std::span<std::byte>, cudaStream_t, int sm_count);
  std::size_t (*bytes)(const AttendParams&);
  bool (*fits)(const AttendParams&);
};

template <class C>
Runner runner(const char* name) {
  return {name, C::kSparse, run_attend<C>, attend_bytes_of<C>, [](const AttendParams& p) {
            return p.pages.layout.head_dim == C::kDim &&
                   (C::kGroup == 0 || p.heads_q == C::kGroup * p.pages.layout.kv_heads) &&
                   std::is_same_v<typename C::Type, __half> ==
                       (p.pages.layout.dtype == DType::kF16) &&
                   (!C::kSparse || C::kRows / (p.heads_q / p.pages.layout.kv_heads) <=
                                       static_cast<int>(8 * sizeof(typename C::TokenSet)));
          }};
}

template <typename T>
void add_runners(std::vector<Runner>& all) {
  all.push_back(runner<DenseConfig<T, 128>>("dense"));
  all.push_back(runner<DenseConfig<T, 64>>("dense"));
  all.push_back(runner<TokenConfig<T, 128>>("sparse"));
  all.push_back(runner<TokenConfig<T, 64>>("sparse"));
  all.push_back(runner<RowConfig<T, 128>>("sparse_rows"));
  all.push_back(runner<RowConfig<T, 64>>("sparse_rows"));
}

const std::vector<Runner>& runners() {
  static const std::vector<Runner> all = [] {
    std::vector<Runner> made;
    add_runners<__nv_bfloat16>(made);
    add_runners<__half>(made);
    return made;
  }();
  return all;
}

int sm_count() {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

template <typename T>
void run_once(Bed<T>& bed, const Runner& r) {
  Array<std::byte> workspace(static_cast<std::int64_t>(r.bytes(bed.params)));
  bed.poison();
  must(r.run(bed.params, {workspace.data(), r.bytes(bed.params)}, nullptr, sm_count()));
  must(cudaDeviceSynchronize());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<SequenceCase> ragged = {{0, 1, false},  {0, 64, false},  {0, 65, false},
                                            {0, 0, false},  {37, 3, false},  {130, 200, false},
                                            {63, 1, false}, {64, 64, false}, {1000, 77, false}};
  const std::vector<SequenceCase> ragged_sparse = {{0, 1, true},    {0, 130, true},   {0, 0, true},
                                                   {37, 3, true},   {700, 200, true}, {63, 1, true},
                                                   {2111, 65, true}};
  for (const int dim : {128, 64}) {
    for (const int group : {16, 8, 4, 2}) {
      const std::string tag =
          std::string("g").append(std::to_string(group)).append("_d").append(std::to_string(dim));
      const int heads = group == 16 ? 2 : 3;
      all.push_back({"dense_" + tag, heads, group, dim, 0, ragged});
      if (group == 2) continue;
      all.push_back({"sparse_" + tag, heads, group, dim, 8, ragged_sparse});
      all.push_back({"hostile_" + tag, heads, group, dim, 8, ragged_sparse, true});
    }
  }
  all.push_back({"hostile_dense", 2, 16, 128, 0, ragged, true});
  all.push_back({"dense_g1", 2, 1, 128, 0, {{0, 200, false}, {70, 90, false}}});
  all.push_back({"dense_g32", 1, 32, 128, 0, {{0, 200, false}, {70, 90, false}}});
  all.push_back({"sparse_g32", 1, 32, 128, 8, {{0, 200, true}, {870, 90, true}}});
  all.push_back({"dense_2500", 2, 16, 128, 0, {{0, 2500, false}}});
  all.push_back({"sparse_2500", 2, 16, 128, 20, {{0, 2500, true}}});
  all.push_back({"sparse_long", 1, 16, 128, 12, {{140001, 40, true}}});
  return all;
}

// Every way through the kernels in few thread blocks.
std::vector<Case> tiny_cases() {
  const std::vector<SequenceCase> some = {{0, 1, false}, {0, 0, false}, {330, 70, false}};
  const std::vector<SequenceCase> some_sparse = {{0, 70, true}, {0, 0, true}, {1111, 21, true}};
  return {{"tiny_dense_g16_d128", 1, 16, 128, 0, some},
          {"tiny_dense_g4_d64", 1, 4, 64, 0, some},
          {"tiny_dense_g1_d128", 1, 1, 128, 0, some},
          {"tiny_dense_hostile", 1, 16, 128, 0, some, true},
          {"tiny_sparse_g16_d128", 1, 16, 128, 8, some_sparse},
          {"tiny_sparse_g4_d64", 1, 4, 64, 8, some_sparse},
          {"tiny_hostile_g8_d128", 1, 8, 128, 8, some_sparse, true},
          {"tiny_hostile_g16_d64", 1, 16, 64, 8, some_sparse, true}};
}

// `once`: without further runs that must yield the same bits.
template <typename T>
bool check_all(const char* type, const std::vector<Case>& chosen, bool once) {
  bool ok = true;
  for (const Case& c : chosen) {
    if (!next_is_mine()) continue;
    Bed<T> bed(c, c.name == "dense_2500" ? 4.0f : 1.0f);
    for (const Runner& r : runners()) {
      if (r.sparse != bed.params.batch.any_sparse || !r.fits(bed.params)) continue;
      run_once(bed, r);
      const auto o = bed.o->host();
      const auto lse = bed.lse->host();
      ok = check(bed, std::string(type) + " " + r.name, bed.tokens > 2000 ? 7 : 1) && ok;
      if (once) continue;
      run_once(bed, r);
      const auto again = bed.o->host();
      if (std::memcmp(o.data(), again.data(), o.size() * sizeof(T)) != 0) {
        std::printf("FAIL %s %s: two runs differ\n", c.name.c_str(), r.name);
        ok = false;
      }
      // Each sequence alone: the same bits.
      for (std::size_t b = 0; b < c.sequences.size() && c.sequences.size() > 1; ++b) {
        const int tokens = c.sequences[b].tokens;
        if (tokens == 0) continue;
        const std::int64_t row = bed.heads() * std::int64_t{c.dim};
        AttendParams alone = bed.params;
        const Array<std::int32_t> starts(std::vector<std::int32_t>{0, tokens});
        alone.batch.num_sequences = 1;
        alone.batch.num_tokens = tokens;
        alone.batch.query_start = starts.data();
        alone.batch.kv_length += b;
        alone.batch.sparse += b;
        alone.batch.page_table += static_cast<std::int64_t>(b) * alone.batch.max_pages;
        alone.q = static_cast<const T*>(alone.q) + bed.starts[b] * row;
        const Array<T> out(tokens * row);
        const Array<float> out_lse(std::int64_t{tokens} * bed.heads());
        alone.o = out.data();
        alone.lse = out_lse.data();
        std::unique_ptr<Array<std::int32_t>> chosen;
        if (alone.selection != nullptr) {
          std::vector<std::int32_t> rows;
          for (int h = 0; h < c.heads_kv; ++h) {
            const auto first =
                bed.selection.begin() +
                (static_cast<std::int64_t>(h) * bed.tokens + bed.starts[b]) * c.columns;
            rows.insert(rows.end(), first, first + tokens * c.columns);
          }
          chosen = std::make_unique<Array<std::int32_t>>(rows);
          alone.selection = chosen->data();
        }
        Array<std::byte> workspace(static_cast<std::int64_t>(r.bytes(alone)));
        must(r.run(alone, {workspace.data(), r.bytes(alone)}, nullptr, sm_count()));
        must(cudaDeviceSynchronize());
        if (std::memcmp(out.host().data(), o.data() + bed.starts[b] * row,
                        static_cast<std::size_t>(tokens * row) * sizeof(T)) != 0) {
          std::printf("FAIL %s %s: sequence %zu alone differs\n", c.name.c_str(), r.name, b);
          ok = false;
        }
      }
    }
  }
  return ok;
}

double median_ms(const AttendParams& params, const Runner& r, Array<std::byte>& workspace,
                 std::size_t bytes, int repeats, double& low) {
  const std::vector<float> times = milliseconds(nullptr, 2, repeats, [&] {
    must(r.run(params, {workspace.data(), bytes}, nullptr, sm_count()));
  });
  low = times.front();
  return times[times.size() / 2];
}

void overlap(const Bed<__nv_bfloat16>& bed, int at) {
  std::printf("# union over one list at %d:", at);
  for (const int tile : {2, 4, 8, 12, 16}) {
    double all = 0;
    int tiles = 0;
    for (int first = at; first + tile <= std::min(at + 192, bed.tokens); first += tile, ++tiles) {
      std::vector<std::int32_t> ids =
          bed.d_selection->host(std::int64_t{first} * kBudget, std::int64_t{tile} * kBudget);
      std::sort(ids.begin(), ids.end());
      all += static_cast<double>(std::unique(ids.begin(), ids.end()) - ids.begin());
    }
    std::printf("  %d: %.2f", tile, all / tiles / kBudget);
  }
  std::printf("\n");
}

void time_all(const std::vector<int>& lengths, const char* only, int group, int dim) {
  for (const int n : lengths) {
    for (const char* input : {"dense", "correlated-0.8", "random"}) {
      const bool sparse = std::strcmp(input, "dense") != 0;
      if (sparse && n <= kBudget * kPageTokens) continue;
      Case c{"time", 2, group, dim, 0, {{0, n, sparse}}};
      const auto wanted = [&](const Runner& r) {
        return r.sparse == sparse && (only == nullptr || std::strcmp(r.name, only) == 0);
      };
      if (std::none_of(runners().begin(), runners().end(), wanted)) continue;
      Bed<__nv_bfloat16> bed(c);
      if (sparse) {
        bed.draw(std::strcmp(input, "random") == 0 ? -1.0f : 0.955f);
        overlap(bed, n - 256);
      }
      double keys = 0;
      for (int p = 0; p < n; ++p) {
        keys += sparse && p / 64 + 1 > kBudget ? (kBudget - 1) * 64 + p % 64 + 1 : p + 1;
      }
      const double flops = 4.0 * keys * bed.heads() * dim;
      for (const Runner& r : runners()) {
        if (!wanted(r) || !r.fits(bed.params)) continue;
        const std::size_t bytes = r.bytes(bed.params);
        Array<std::byte> workspace(static_cast<std::int64_t>(bytes));
        bed.poison();
        double low = 0;
        const double ms =
            median_ms(bed.params, r, workspace, bytes, n > 100000 && !sparse ? 3 : 7, low);
        std::printf(
            "{\"name\":\"attend.forward\",\"config\":\"%s\",\"input\":\"%s\",\"tokens\":%d,"
            "\"group\":%d,\"dim\":%d,\"ms\":%"
            ".3f,"
            "\"ms_low\":%.3f,\"tflops\":%.0f,\"workspace_mb\":%.0f}\n",
            r.name, input, n, group, dim, ms, low, flops / ms * 1e-9,
            static_cast<double>(bytes) * 1e-6);
        std::fflush(stdout);
        if (n >= 8192) check(bed, r.name, n / 3 - 1);
      }
    }
  }
}

}  // namespace
}  // namespace infllm::cuda::testing

int main(int argc, char** argv) {
  using namespace infllm::cuda::testing;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "check" || verb == "tiny") {
    const std::string part = argc > 2 ? argv[2] : "";
    const bool tiny = verb == "tiny";
    std::vector<Case> chosen = tiny ? tiny_cases() : cases();
    std::erase_if(chosen, [&](const Case& c) { return c.name.find(part) == std::string::npos; });
    const bool ok =
        check_all<__nv_bfloat16>("bf16", chosen, tiny) & check_all<__half>("f16", chosen, tiny);
    std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
    return ok ? 0 : 1;
  }
  if (verb == "time") {
    const char* only = nullptr;
    int group = 16, dim = 128;
    std::vector<int> lengths;
    for (int i = 2; i < argc; ++i) {
      if (std::sscanf(argv[i], "g%d_d%d", &group, &dim) == 2) continue;
      if (std::atoi(argv[i]) > 0) {
        lengths.push_back(std::atoi(argv[i]));
      } else {
        only = argv[i];
      }
    }
    time_all(lengths, only, group, dim);
    return 0;
  }
  std::printf("usage: %s check [NAME] | tiny | time [CONFIG] [gG_dD] N...\n", argv[0]);
  return 2;
}
