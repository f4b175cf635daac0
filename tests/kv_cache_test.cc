// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/kv_cache.h"

#include <gmock/gmock.h>

#include "infllm/backend/reference/rounding.h"
#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class KvCacheTest : public ::testing::TestWithParam<Point> {};

// What is read is what was appended, rounded to the nearest number of the cache's type.
TEST_P(KvCacheTest, ReadsWhatWasAppended) {
  SKIP_WITHOUT(GetParam(), kv_append);
  SKIP_WITHOUT(GetParam(), kv_read);
  const Case& c = case_named(GetParam().case_name);
  Rig rig(open(GetParam().backend), c, GetParam().kv);
  for (const Step& step : c.steps) rig.enter(step);
  const CachedPlanes planes = rig.read();
  std::vector<double> k, v;
  const auto append = [&](std::vector<double>& all, const std::vector<double>& rows) {
    for (const double x : rows) all.push_back(reference::round_to(GetParam().kv, x));
  };
  for (const SequenceNumbers& numbers : rig.numbers()) {
    append(k, numbers.k);
    append(v, numbers.v);
  }
  EXPECT_EQ(planes.k, k) << describe(label_of(GetParam(), "kv_read k"));
  EXPECT_EQ(planes.v, v) << describe(label_of(GetParam(), "kv_read v"));
}

INSTANTIATE_TEST_SUITE_P(Grid, KvCacheTest, ::testing::ValuesIn(whole_grid()), point_name);

class KvCacheEdge : public ::testing::TestWithParam<std::string> {};

// A rejected continuation leaves no trace, neither in the cache nor in attention.
TEST_P(KvCacheEdge, RollingBackAndAppendingAgainIsLikeNeverHavingErred) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "chunked"};
  SKIP_WITHOUT(point, attend);
  const Case& c = case_named(point.case_name);
  const auto step = [&](std::int32_t first, std::int32_t end) {
    return Step(static_cast<std::size_t>(c.sequences()), Span{first, end});
  };
  Rig straight(open(GetParam()), c, point.kv);
  straight.enter(step(523, 530));

  Rig erring(open(GetParam()), c, point.kv);
  const std::vector<SequenceNumbers> right = erring.numbers();
  erring.enter(step(500, 523));
  for (SequenceNumbers& numbers : erring.numbers()) {
    for (double& x : numbers.k) x = -x;
    for (double& x : numbers.v) x = -x;
  }
  erring.enter(step(523, 600));
  erring.numbers() = right;
  erring.enter(step(523, 530));
  const Attended want = straight.attention();
  const Attended got = erring.attention();
  EXPECT_EQ(got.o, want.o);
  EXPECT_EQ(got.lse, want.lse);
}

TEST_P(KvCacheEdge, PagesOfADenseModelAreSmaller) {
  const Backend backend = open(GetParam());
  const DType kv = cache_types(GetParam()).back();
  KvLayout layout{.dtype = kv, .kv_heads = 2, .head_dim = 64};
  SKIP_WITHOUT((Point{GetParam(), kv, ""}), kv_append);
  must(check(backend, layout));
  const std::int64_t with_pooled = kv_page_bytes(backend, layout);
  layout.pooled_keys = false;
  EXPECT_LT(kv_page_bytes(backend, layout), with_pooled);
  layout.pooled_keys = true;
  layout.config.use_nope = true;
  EXPECT_GT(kv_page_bytes(backend, layout), with_pooled);
}

INSTANTIATE_TEST_SUITE_P(Backends, KvCacheEdge, ::testing::ValuesIn(all_backends()), backend_id);

TEST(KvCacheRefusal, OfLayoutsNamesWhatIsWrong) {
  const auto refusal = [](auto&& change) {
    KvLayout layout{.kv_heads = 2, .head_dim = 64};
    change(layout);
    return message_of(check(layout));
  };
  EXPECT_THAT(refusal([](KvLayout& l) { l.kv_heads = 0; }), HasSubstr("0 KV heads of dimension"));
  EXPECT_THAT(refusal([](KvLayout& l) { l.head_dim = -1; }), HasSubstr("of dimension -1"));
  EXPECT_THAT(refusal([](KvLayout& l) { l.dtype = DType::kI8; }),
              HasSubstr("of type i8, expected f64, f32, bf16 or f16"));
  const auto config = [&](auto&& change) {
    return refusal([&](KvLayout& l) { change(l.config); });
  };
  EXPECT_THAT(config([](SparseConfig& c) { c.kernel_size = 40; }),
              HasSubstr("kernel_size = 40, expected a multiple of kernel_stride = 16"));
  EXPECT_THAT(config([](SparseConfig& c) { c.block_size = 32; }),
              HasSubstr("block_size = 32, expected a multiple of 4 * kernel_stride = 64"));
  EXPECT_THAT(config([](SparseConfig& c) { c.window_size = 100; }),
              HasSubstr("window_size = 100, expected a multiple of block_size = 64"));
  EXPECT_THAT(config([](SparseConfig& c) { c.kernel_stride = 0; }),
              HasSubstr("kernel_stride = 0, expected 1 to"));
  EXPECT_THAT(config([](SparseConfig& c) { c.kernel_size = 8; }),
              HasSubstr("kernel_size = 8, expected 16 to"));
  EXPECT_THAT(config([](SparseConfig& c) { c.topk = 0; }), HasSubstr("topk = 0, expected 1 to"));
  EXPECT_THAT(config([](SparseConfig& c) { c.topk = INT32_MAX; }), HasSubstr("topk = 2147483647"));
  EXPECT_THAT(config([](SparseConfig& c) { c.init_blocks = -1; }), HasSubstr("init_blocks = -1"));
  EXPECT_THAT(config([](SparseConfig& c) { c.dense_len = -2; }), HasSubstr("dense_len = -2"));
  EXPECT_THAT(config([](SparseConfig& c) {
                c.window_size = 0;
                c.legacy_window = true;
              }),
              HasSubstr("window_size = 0 with legacy_window"));
}

TEST(KvCacheRefusal, OfParametersNamesWhatIsWrong) {
  Case c = case_named("use_nope");
  Rig rig(open("reference"), c, DType::kF32);
  rig.enter(c.steps[0]);
  KvAppendParams params{.pages = rig.pages(), .batch = rig.batch()};
  const auto refusal = [&] { return message_of(kv_append(rig.backend(), params)); };
  EXPECT_EQ(refusal(), "kv_append: k is null, expected an array");
  params.k = &rig;
  EXPECT_EQ(refusal(), "kv_append: v is null, expected an array");
  params.v = &rig;
  EXPECT_EQ(refusal(), "kv_append: k_score (use_nope) is null, expected an array");
  KvReadParams read{.pages = rig.pages(), .batch = rig.batch(), .fine = &rig};
  read.pages.layout.pooled_keys = false;
  EXPECT_THAT(message_of(kv_read(rig.backend(), read)),
              HasSubstr("kv_read: pooled keys of a cache that has none"));
  Kernels none;
  Backend bare = rig.backend();
  bare.name = "bare";
  bare.kernels = &none;
  EXPECT_THAT(message_of(check(bare, rig.pages().layout)),
              HasSubstr("the device \"bare\" keeps no cache"));
}

// A batch as planners build it, good until a test spoils it.
struct Plan {
  std::vector<std::int32_t> starts = {0, 3, 3, 4};
  std::vector<std::int32_t> lengths = {70, 0, 1};
  std::vector<std::int32_t> table = {4, 2, 0, 0, 1, 0};
  std::vector<std::uint8_t> sparse = {1, 0, 0};
  Batch batch{.num_sequences = 3,
              .num_tokens = 4,
              .max_pages = 2,
              .any_sparse = true,
              .max_query_length = 3,
              .max_kv_length = 70};
  Status check() {
    batch.query_start = starts.data();
    batch.kv_length = lengths.data();
    batch.page_table = table.data();
    if (!sparse.empty()) batch.sparse = sparse.data();
    return check_contents(batch, 64, 5);
  }
};

TEST(BatchRefusal, NamesWhatIsWrong) {
  EXPECT_TRUE(Plan().check().ok());
  const auto refusal = [](auto&& change) {
    Plan plan;
    change(plan);
    return message_of(plan.check());
  };
  EXPECT_THAT(refusal([](Plan& p) { p.starts[0] = 1; }), HasSubstr("query_start[0] = 1"));
  EXPECT_THAT(refusal([](Plan& p) { p.starts[2] = 2; }),
              HasSubstr("query_start falls from 3 to 2 at sequence 1"));
  EXPECT_THAT(refusal([](Plan& p) { p.starts[3] = 5; }), HasSubstr("2 new tokens"));
  EXPECT_THAT(refusal([](Plan& p) { p.lengths[0] = 2; }),
              HasSubstr("sequence 0 has 2 keys but 3 new tokens"));
  EXPECT_THAT(refusal([](Plan& p) { p.lengths[0] = 129; }), HasSubstr("needs 3 pages"));
  EXPECT_THAT(refusal([](Plan& p) { p.table[1] = 5; }),
              HasSubstr("sequence 0 has page 5 at block 1, expected 0 to 4"));
  EXPECT_THAT(refusal([](Plan& p) { p.table[4] = -1; }), HasSubstr("sequence 2 has page -1"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.num_tokens = 5; }),
              HasSubstr("num_tokens = 5, but query_start ends at 4"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.max_kv_length = 69; }),
              HasSubstr("the longest are 3 and 70"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.max_query_length = 2; }),
              HasSubstr("the longest are 3 and 70"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.any_sparse = false; }),
              HasSubstr("any_sparse = false, but sparse[] says true"));
  EXPECT_THAT(refusal([](Plan& p) { p.sparse.clear(); }), HasSubstr("but sparse is null"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.num_sequences = -1; }), HasSubstr("-1 sequences"));
  EXPECT_THAT(refusal([](Plan& p) { p.batch.max_query_length = 0; }),
              HasSubstr("max_query_length = 0 with 4 tokens"));
}

}  // namespace
}  // namespace infllm::testing
