// SPDX-License-Identifier: Apache-2.0
//
// Taking a projection apart in one step leaves the numbers that rope, gather and kv_append leave,
// and those that compress leaves after them, bit for bit, on every column that has it.
#include "infllm/ops/rope_append.h"

#include <gmock/gmock.h>

#include <cmath>
#include <numeric>

#include "infllm/ops/compress.h"
#include "infllm/ops/kernels.h"
#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

struct Shape {
  std::int32_t heads_q, heads_kv, head_dim;
  bool use_nope;
};

// What a step leaves behind.
struct Left {
  std::vector<double> q, q_score;
  std::vector<std::uint16_t> pages;
  bool operator==(const Left&) const = default;
};

class RopeAppendTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    backend_ = open(GetParam());
    if (!has_rope_append(backend_)) GTEST_SKIP() << "takes the long way";
  }

  DType activation() const { return backend_.kernels->activation; }

  // Sequences with `cached` keys get `tokens` more, and their new windows if they are to `pool`.
  Left run(const Shape& shape, const std::vector<std::int32_t>& cached,
           const std::vector<std::int32_t>& tokens, bool at_once, bool pool = false) {
    SparseConfig config;
    config.use_nope = shape.use_nope;
    const KvLayout layout{.dtype = activation(),
                          .kv_heads = shape.heads_kv,
                          .head_dim = shape.head_dim,
                          .config = config};
    must(check(backend_, layout));
    std::vector<std::int32_t> starts = {0};
    std::vector<std::int32_t> lengths;
    Batch batch;
    for (std::size_t b = 0; b < cached.size(); ++b) {
      starts.push_back(starts.back() + tokens[b]);
      lengths.push_back(cached[b] + tokens[b]);
      batch.max_query_length = std::max(batch.max_query_length, tokens[b]);
      batch.max_kv_length = std::max(batch.max_kv_length, lengths.back());
    }
    batch.num_sequences = static_cast<std::int32_t>(cached.size());
    batch.num_tokens = starts.back();
    batch.max_pages = static_cast<std::int32_t>(config.blocks_in(batch.max_kv_length));
    const std::int32_t pages = batch.num_sequences * batch.max_pages;
    std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
    std::iota(table.rbegin(), table.rend(), 0);
    const Buffer starts_memory = upload(backend_, starts);
    const Buffer lengths_memory = upload(backend_, lengths);
    const Buffer table_memory = upload(backend_, table);
    batch.query_start = starts_memory.as<std::int32_t>();
    batch.kv_length = lengths_memory.as<std::int32_t>();
    batch.page_table = table_memory.as<std::int32_t>();

    const std::int64_t page_bytes = kv_page_bytes(backend_, layout);
    Random random(17);
    const std::int64_t numbers = pages * page_bytes / size_of(activation());
    const Buffer memory = upload(backend_, random.normals(numbers, activation()), activation());
    const KvPages cache{memory.data(), layout, page_bytes, pages};

    const std::int64_t count = batch.num_tokens;
    const std::int32_t heads = shape.heads_q + 2 * shape.heads_kv;
    const Buffer qkv = upload(
        backend_, random.normals(count * heads * shape.head_dim, activation()), activation());
    std::vector<float> cos, sin;
    for (std::int64_t i = 0; i < count * shape.head_dim / 2; ++i) {
      const double angle = random.normal();
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    const Buffer cos_memory = floats(cos);
    const Buffer sin_memory = floats(sin);
    const std::int64_t q_count = count * shape.heads_q * shape.head_dim;
    const std::int64_t k_count = count * shape.heads_kv * shape.head_dim;
    const Buffer q = poisoned(backend_, q_count, activation());
    const Buffer q_score = poisoned(backend_, q_count, activation());

    if (at_once) {
      const RopeAppendParams params{.pages = cache,
                                    .batch = batch,
                                    .heads_q = shape.heads_q,
                                    .qkv = qkv.data(),
                                    .cos = cos_memory.as<float>(),
                                    .sin = sin_memory.as<float>(),
                                    .q = q.data(),
                                    .q_score = q_score.data(),
                                    .pool = pool};
      must(rope_append(backend_, params));
    } else {
      const auto cut = [&](std::int32_t first, std::int32_t many, const Buffer& to) {
        must(gather(backend_, {.count = count,
                               .width = std::int64_t{many} * shape.head_dim,
                               .row_stride = std::int64_t{heads} * shape.head_dim,
                               .first_column = std::int64_t{first} * shape.head_dim,
                               .x = qkv.data(),
                               .y = to.data()}));
      };
      const Buffer k = poisoned(backend_, k_count, activation());
      const Buffer v = poisoned(backend_, k_count, activation());
      const Buffer k_score = poisoned(backend_, k_count, activation());
      if (shape.use_nope) {
        cut(0, shape.heads_q, q_score);
        cut(shape.heads_q, shape.heads_kv, k_score);
      }
      must(rope(backend_, {.tokens = count,
                           .heads = shape.heads_q + shape.heads_kv,
                           .head_dim = shape.head_dim,
                           .row_stride = std::int64_t{heads} * shape.head_dim,
                           .x = qkv.data(),
                           .cos = cos_memory.as<float>(),
                           .sin = sin_memory.as<float>()}));
      cut(0, shape.heads_q, q);
      cut(shape.heads_q, shape.heads_kv, k);
      cut(shape.heads_q + shape.heads_kv, shape.heads_kv, v);
      must(kv_append(backend_, {.pages = cache,
                                .batch = batch,
                                .k = k.data(),
                                .v = v.data(),
                                .k_score = shape.use_nope ? k_score.data() : nullptr}));
      if (pool) must(compress(backend_, {.pages = cache, .batch = batch}));
    }
    // All of the pages, byte for byte, pooled rows included: the caches must not differ anywhere.
    std::vector<std::uint16_t> raw(static_cast<std::size_t>(numbers));
    must(copy_out(backend_, raw.data(), memory.data(), raw.size() * sizeof(raw[0])));
    Left result{.q = download(backend_, q, q_count, activation()), .pages = std::move(raw)};
    if (shape.use_nope) result.q_score = download(backend_, q_score, q_count, activation());
    return result;
  }

  Buffer floats(const std::vector<float>& values) const {
    Buffer buffer = must(allocate(backend_, values.size() * sizeof(float)));
    must(copy_in(backend_, buffer.data(), values.data(), buffer.bytes()));
    return buffer;
  }

  Backend backend_;
};

TEST_P(RopeAppendTest, IsTheLongWayInOneStep) {
  for (const Shape& shape :
       {Shape{4, 2, 64, false}, {32, 2, 128, false}, {7, 1, 128, true}, {16, 2, 64, true}}) {
    for (const auto& [cached, tokens] :
         {std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>>{{0}, {1}},
          {{63}, {1}},
          {{64, 0, 200}, {1, 1, 1}},
          {{0, 5, 127, 64}, {130, 0, 64, 300}}}) {
      EXPECT_EQ(run(shape, cached, tokens, true), run(shape, cached, tokens, false))
          << shape.heads_q << "/" << shape.heads_kv << " heads of " << shape.head_dim
          << (shape.use_nope ? ", unrotated keys too; " : "; ") << tokens.size() << " sequences";
    }
  }
}

// Around every place where a window can end, with a company that is elsewhere or has no token.
TEST_P(RopeAppendTest, PoolsWhatCompressWould) {
  for (const Shape& shape :
       {Shape{4, 2, 64, false}, {32, 2, 128, false}, {7, 1, 128, true}, {16, 2, 64, true}}) {
    for (const std::int32_t length : {1, 31, 32, 33, 48, 63, 64, 127, 128, 144, 192, 1024}) {
      const std::vector<std::int32_t> cached = {length - 1, 95, 40, 255};
      const std::vector<std::int32_t> tokens = {1, 1, 0, 1};
      EXPECT_EQ(run(shape, cached, tokens, true, true), run(shape, cached, tokens, false, true))
          << shape.heads_q << "/" << shape.heads_kv << " heads of " << shape.head_dim
          << (shape.use_nope ? ", unrotated keys too; " : "; ") << length << " keys";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Columns, RopeAppendTest, ::testing::ValuesIn(kernel_backends()),
                         backend_id);

TEST(RopeAppend, RefusesWhatCannotWork) {
  const Backend backend = open("reference");
  const KvPages pages{.layout = {.dtype = DType::kF64, .kv_heads = 2, .head_dim = 64}};
  EXPECT_THAT(message_of(rope_append(backend, {.pages = pages, .heads_q = 3})),
              HasSubstr("3 query heads and 2 KV heads"));
  EXPECT_TRUE(rope_append(backend, {.pages = pages, .heads_q = 4}).ok());
}

}  // namespace
}  // namespace infllm::testing
