// SPDX-License-Identifier: Apache-2.0
//
// What the programs that test prefill rows and their gradients share: cases at edges, small cases
// for compute-sanitizer, selections that nobody would make, and how all of them are gone through.
//
//   CaseList list(Case{.config = ..., .heads_kv = 2, .group = 4, .dim = 64, .spans =
//   ragged_spans()}); list.add("group 7", [](Case& c) { c.group = 7; }); list.add_edges(); const
//   int bad = count_failures(list.cases, nullptr, [&]<typename T>(const Case& c, T) {
//     return check_case<T>(backend, c);
//   });
#pragma once

#include "tests/cuda/prefill_check.h"
#include "tests/cuda/shard.h"

namespace infllm::cuda {

// With and without history, sparse and dense, empty ones, one that adds no token.
inline std::vector<Span> ragged_spans() {
  return {{517, 541},        {0, 70},     {460, 461}, {0, 0},      {701, 720},
          {300, 333, false}, {900, 1000}, {128, 128}, {1500, 1700}};
}

struct CaseList {
  explicit CaseList(Case usual) : base(std::move(usual)) {}

  template <typename Change>
  void add(std::string name, Change&& change) {
    Case c = base;
    c.name = std::move(name);
    change(c);
    cases.push_back(std::move(c));
  }

  // Both head dimensions and both types of each group.
  template <typename Change>
  void add_shapes(std::initializer_list<int> groups, Change&& change) {
    for (const int group : groups) {
      for (const int dim : {64, 128}) {
        for (const DType dtype : {DType::kBF16, DType::kF16}) {
          const std::string name = "g" + std::to_string(group) + " d" + std::to_string(dim) + " " +
                                   std::string(name_of(dtype));
          add(name, [&](Case& c) {
            c.group = group;
            c.dim = dim;
            c.dtype = dtype;
            change(c);
          });
        }
      }
    }
  }

  // Of lengths and of numbers.
  void add_edges() {
    add("edges", [](Case& c) {
      c.spans.clear();
      for (const int n : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
        c.spans.push_back({0, n});
        c.spans.push_back({std::max(0, n - 1), n});
      }
    });
    add("zero queries", [](Case& c) { c.query_scale = 0; });
    add("large logits", [](Case& c) { c.query_scale = 60; });
    add("missing pages", [](Case& c) { c.missing_pages = true, c.group = 16, c.dim = 128; });
  }

  Case base;
  std::vector<Case> cases;
};

// Every way through the kernels in few thread blocks.
inline std::vector<Case> tiny_cases(const SparseConfig& config) {
  CaseList list(
      {.config = config, .heads_kv = 1, .spans = {{517, 541}, {0, 0}, {0, 70}, {300, 303, false}}});
  const auto add = [&](std::string name, int group, int dim, auto change) {
    list.add("tiny " + name, [&](Case& c) { c.group = group, c.dim = dim, change(c); });
  };
  const auto as_it_is = [](Case&) {};
  add("g1 d64 f16", 1, 64, [](Case& c) { c.dtype = DType::kF16; });
  add("g7 d128 bf16", 7, 128, as_it_is);
  add("g16 d64 bf16", 16, 64, as_it_is);
  add("g16 d128 bf16", 16, 128, as_it_is);
  add("edges", 4, 64, [](Case& c) {
    c.spans = {{0, 1}, {15, 17}, {62, 65}, {127, 129}, {384, 386}};
  });
  add("missing pages", 4, 128, [](Case& c) { c.missing_pages = true; });
  return std::move(list.cases);
}

// Ascending blocks, the first one nearly always, holes, rows without any, numbers that are none.
template <typename T>
std::vector<int> any_selection(const Rig<T>& rig, int columns) {
  const std::int64_t blocks = (rig.batch.max_kv_length + 63) / 64;
  const std::size_t rows = std::size_t(rig.c.heads_kv) * rig.batch.num_tokens;
  std::vector<int> selection(rows * columns, -1);
  Random random{5};
  for (std::size_t r = 0; r < rows; ++r) {
    if (random.below(7) == 0) continue;
    int at = 0;
    const int stride = 1 + random.below(int(std::max<std::int64_t>(1, 2 * blocks / columns)));
    for (int b = 0; b < blocks && at < columns; b += 1 + random.below(stride)) {
      selection[r * columns + at++] = b;
    }
    if (at < columns) selection[r * columns + at] = 1 << 29;
  }
  return selection;
}

// Runs it with that much poisoned memory, and waits for it.
template <typename Run>
void with_workspace(std::size_t bytes, Run&& run) {
  const Array<std::byte> workspace(bytes);
  must(run(std::span<std::byte>(workspace.data(), bytes)));
  must(cudaDeviceSynchronize());
}

// Of this process's cases, or of the one named `wanted`, those for which check(c, T()) is false.
template <typename Check>
int count_failures(const std::vector<Case>& cases, const char* wanted, Check&& check) {
  int bad = 0;
  for (const Case& c : cases) {
    if ((wanted != nullptr && c.name != wanted) || !next_is_mine()) continue;
    bad += !(c.dtype == DType::kF16 ? check(c, __half()) : check(c, __nv_bfloat16()));
  }
  return bad;
}

}  // namespace infllm::cuda
