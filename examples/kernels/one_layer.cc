// SPDX-License-Identifier: Apache-2.0
//
// One attention layer without a model or an engine: what another engine has to write. Fills a paged
// cache with random keys and values, then attends from every token, sparse and dense.
//
//   one_layer [TOKENS]
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <random>
#include <vector>

#include "infllm/backend/open.h"
#include "infllm/ops/attention.h"
#include "infllm/ops/backend.h"

namespace {

using infllm::Buffer;
using infllm::Status;

constexpr std::int32_t kHeadsQ = 16, kHeadsKv = 2, kHeadDim = 64;

std::vector<float> random_rows(std::int64_t rows) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(rows * kHeadDim);
  for (float& value : values) value = normal(generator);
  return values;
}

Status run(std::int32_t tokens) {
  const infllm::Backend backend = INFLLM_TRY(infllm::open_backend("cpu"));

  // The cache: pages of one block, here handed out in order.
  infllm::SparseConfig config;
  config.dense_len = 0;
  const infllm::KvLayout layout{.kv_heads = kHeadsKv, .head_dim = kHeadDim, .config = config};
  INFLLM_TRY(check(backend, layout));
  const auto pages = static_cast<std::int32_t>(config.blocks_in(tokens));
  const Buffer memory =
      INFLLM_TRY(allocate(backend, kv_page_bytes(backend, layout) * std::size_t(pages)));
  const infllm::KvPages cache{memory.data(), layout, kv_page_bytes(backend, layout), pages};
  std::vector<std::int32_t> page_table(pages);
  std::iota(page_table.begin(), page_table.end(), 0);

  // The first step appends all keys; pooling them is part of attention().
  std::int32_t query_start[] = {0, tokens};
  std::uint8_t sparse[] = {1};
  infllm::Batch batch{.num_sequences = 1,
                      .num_tokens = tokens,
                      .query_start = query_start,
                      .kv_length = &tokens,
                      .page_table = page_table.data(),
                      .max_pages = pages,
                      .sparse = sparse,
                      .any_sparse = true,
                      .max_query_length = tokens,
                      .max_kv_length = tokens};
  const std::vector<float> k = random_rows(std::int64_t{tokens} * kHeadsKv);
  const std::vector<float> v = random_rows(std::int64_t{tokens} * kHeadsKv);
  const std::vector<float> q = random_rows(std::int64_t{tokens} * kHeadsQ);
  INFLLM_TRY(kv_append(backend, {.pages = cache, .batch = batch, .k = k.data(), .v = v.data()}));

  std::vector<float> o(q.size());
  infllm::AttentionParams params{.pages = cache,
                                 .batch = batch,
                                 .config = config,
                                 .heads_q = kHeadsQ,
                                 .scale = 0.125f,
                                 .q = q.data(),
                                 .o = o.data()};
  for (const bool is_sparse : {true, false}) {
    params.batch.any_sparse = is_sparse;
    params.batch.sparse = is_sparse ? sparse : nullptr;
    const Buffer workspace =
        INFLLM_TRY(allocate(backend, attention_workspace_bytes(backend, params)));
    const auto start = std::chrono::steady_clock::now();
    INFLLM_TRY(attention(backend, params, {workspace.data(), workspace.bytes()}));
    const std::chrono::duration<double, std::milli> elapsed =
        std::chrono::steady_clock::now() - start;
    std::cout << backend.name << ", " << tokens << " tokens, " << (is_sparse ? "sparse" : "dense")
              << ": " << elapsed.count() << " ms\n";
  }
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  const Status status = run(argc > 1 ? std::atoi(argv[1]) : 16384);
  if (status.ok()) return 0;
  std::cerr << status.message() << '\n';
  return 1;
}
