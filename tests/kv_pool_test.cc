// SPDX-License-Identifier: Apache-2.0
//
// Every page is free or has as many lists as share it, whatever happens in whatever order.
#include "infllm/engine/kv_pool.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <set>

#include "infllm/backend/open.h"
#include "infllm/engine/sequence.h"

namespace infllm::engine {
namespace {

constexpr std::int32_t kLayers = 3;

KvLayout small_layout() {
  return {.dtype = DType::kF64, .kv_heads = 1, .head_dim = 4, .config = {}};
}

KvPool make_pool(std::int32_t pages) {
  const Backend backend = open_backend("reference", {.threads = 1}).value();
  return KvPool::create(backend, small_layout(), kLayers, pages).value();
}

void expect_exact(const KvPool& pool, const std::vector<std::vector<std::int32_t>>& owners) {
  std::set<std::int32_t> seen;
  std::size_t owned = 0;
  for (const auto& pages : owners) {
    owned += pages.size();
    seen.insert(pages.begin(), pages.end());
  }
  ASSERT_EQ(seen.size(), owned) << "a page has two owners";
  ASSERT_EQ(owned + pool.free_pages(), pool.total_pages()) << "a page is lost";
  if (!seen.empty()) {
    ASSERT_GE(*seen.begin(), 0);
    ASSERT_LT(*seen.rbegin(), pool.total_pages());
  }
}

TEST(KvPool, RandomTakingAndGivingBackLosesNothing) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    KvPool pool = make_pool(1 + static_cast<std::int32_t>(random() % 40));
    std::vector<std::vector<std::int32_t>> owners(4);
    for (int i = 0; i < 300; ++i) {
      auto& pages = owners[random() % owners.size()];
      const auto tokens = static_cast<std::int64_t>(random() % 1000);
      const auto before = pages;
      const std::int32_t free_before = pool.free_pages();
      if (random() % 2 == 0) {
        const bool fits =
            pool.pages_for(tokens) <= static_cast<std::int64_t>(before.size()) + free_before;
        ASSERT_EQ(pool.extend(pages, tokens), fits);
        if (!fits) {
          ASSERT_EQ(pages, before) << "a refusal took pages";
        }
        if (fits) {
          ASSERT_GE(std::ssize(pages), pool.pages_for(tokens));
        }
      } else {
        pool.shrink(pages, tokens);
        ASSERT_EQ(std::ssize(pages), std::min(std::ssize(before), pool.pages_for(tokens)));
      }
      const std::size_t kept = std::min(before.size(), pages.size());
      ASSERT_TRUE(std::equal(pages.begin(), pages.begin() + kept, before.begin()))
          << "pages in use moved";
      expect_exact(pool, owners);
    }
  }
}

// Lists of pages under names: what each page holds is seen through every list that has it.
TEST(KvPool, SharedPagesAreFreeWithTheirLastListAndCopiedBeforeTheyAreWritten) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    KvPool pool = make_pool(30);
    const std::int64_t page_bytes = pool.layer(0).page_bytes;
    const auto number = [&](std::int32_t layer, std::int32_t page) -> std::int32_t& {
      return *reinterpret_cast<std::int32_t*>(static_cast<std::byte*>(pool.layer(layer).data) +
                                              (page + 1) * page_bytes - 4);
    };
    std::vector<std::vector<std::int32_t>> lists(5);
    std::vector<std::vector<std::int32_t>> contents(5);
    for (int i = 0; i < 400; ++i) {
      const std::size_t one = random() % lists.size();
      const std::size_t other = random() % lists.size();
      const auto first = static_cast<std::int64_t>(random() % 8);
      switch (random() % 3) {
        case 0:  // shrink, and share what another has
          if (one == other) break;
          pool.shrink(lists[one], 0);
          lists[one] = pool.share(
              std::span(lists[other])
                  .first(std::min(lists[other].size(), static_cast<std::size_t>(first))));
          contents[one].assign(contents[other].begin(),
                               contents[other].begin() + std::ssize(lists[one]));
          break;
        case 1:  // write the end
        {
          const std::vector<std::int32_t> before = lists[one];
          const bool owned = pool.own(lists[one], first).value();
          if (!owned) {
            ASSERT_EQ(lists[one], before) << "a refusal changed pages";
            break;
          }
          if (!pool.extend(lists[one], static_cast<std::int64_t>(64 * (random() % 9)))) break;
          contents[one].resize(lists[one].size());
          for (std::size_t k = std::min(before.size(), static_cast<std::size_t>(first));
               k < lists[one].size(); ++k) {
            contents[one][k] = static_cast<std::int32_t>(random() % 1000);
            for (std::int32_t layer = 0; layer < kLayers; ++layer) {
              number(layer, lists[one][k]) = contents[one][k] + layer;
            }
          }
          break;
        }
        default:
          pool.shrink(lists[one], 64 * first);
          contents[one].resize(lists[one].size());
      }
      std::set<std::int32_t> held;
      for (std::size_t list = 0; list < lists.size(); ++list) {
        ASSERT_EQ(lists[list].size(), contents[list].size());
        for (std::size_t k = 0; k < lists[list].size(); ++k) {
          held.insert(lists[list][k]);
          for (std::int32_t layer = 0; layer < kLayers; ++layer) {
            ASSERT_EQ(number(layer, lists[list][k]), contents[list][k] + layer)
                << "list " << list << ", place " << k;
          }
        }
      }
      ASSERT_EQ(std::ssize(held) + pool.free_pages(), pool.total_pages());
    }
  }
}

// By hand, with windows of 32 every 16 and of 128 every 64: page 0 has its last windows from token
// 48 to 80 and from 0 to 128.
TEST(KvPool, PagesAreSettledWhenTheirWindowsAreComplete) {
  const KvPool pool = make_pool(1);
  EXPECT_EQ(pool.settled_pages(0), 0);
  EXPECT_EQ(pool.settled_pages(127), 0);
  EXPECT_EQ(pool.settled_pages(128), 1);
  EXPECT_EQ(pool.settled_pages(191), 1);
  EXPECT_EQ(pool.settled_pages(192), 2);
  const Backend backend = open_backend("reference", {.threads = 1}).value();
  KvLayout layout = small_layout();
  layout.pooled_keys = false;
  const KvPool dense = KvPool::create(backend, layout, kLayers, 1).value();
  EXPECT_EQ(dense.settled_pages(63), 0);
  EXPECT_EQ(dense.settled_pages(64), 1);
}

TEST(KvPool, PagesForIsExactAtTheBorders) {
  const KvPool pool = make_pool(1);
  EXPECT_EQ(pool.pages_for(0), 0);
  EXPECT_EQ(pool.pages_for(1), 1);
  EXPECT_EQ(pool.pages_for(64), 1);
  EXPECT_EQ(pool.pages_for(65), 2);
}

TEST(KvPool, LayersShareTheBufferWithoutOverlap) {
  const KvPool pool = make_pool(5);
  for (std::int32_t i = 0; i < kLayers; ++i) {
    const KvPages pages = pool.layer(i);
    EXPECT_EQ(pages.num_pages, 5);
    const auto* begin = static_cast<const std::byte*>(pages.data);
    const auto* first = static_cast<const std::byte*>(pool.layer(0).data);
    EXPECT_EQ(begin - first, i * 5 * pages.page_bytes);
  }
  EXPECT_EQ(pool.bytes(), kLayers * 5 * pool.layer(0).page_bytes);
}

// A sequence and the modes in which its tokens were computed.
class SequenceTest : public ::testing::Test {
 protected:
  static std::vector<std::int32_t> ids(std::int32_t count) {
    std::vector<std::int32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), 0);
    return tokens;
  }
  // As the engine does: pages, prefill, `generated` decoded tokens.
  void run(const std::vector<std::int32_t>& prompt, std::int32_t generated) {
    sequence_.restart(prompt, rule_, pool_);
    ASSERT_TRUE(pool_.extend(sequence_.pages, sequence_.length() + generated));
    while (sequence_.uncached() > 0) {
      const std::int32_t count = std::min(100, sequence_.uncached());
      sequence_.advance(count, rule_.at(sequence_.deciding_length(count)));
    }
    for (std::int32_t i = 0; i < generated; ++i) {
      sequence_.tokens.push_back(sequence_.length());
      sequence_.advance(1, rule_.at(sequence_.deciding_length(1)));
    }
  }

  KvPool pool_ = make_pool(100);
  ModeRule rule_{.sparse = SparseConfig{.dense_len = 1000}};
  Sequence sequence_;
};

TEST_F(SequenceTest, KeepsTheCommonPrefixButNotTheLastToken) {
  run(ids(500), 10);
  EXPECT_EQ(reusable_prefix(sequence_, ids(800), rule_), 510);
  EXPECT_EQ(reusable_prefix(sequence_, ids(300), rule_), 299);
  std::vector<std::int32_t> other = ids(500);
  other[123] = -7;
  EXPECT_EQ(reusable_prefix(sequence_, other, rule_), 123);
  EXPECT_EQ(reusable_prefix(sequence_, {}, rule_), 0);
}

TEST_F(SequenceTest, DenseKeysAreNotReusedUnderASparsePrompt) {
  run(ids(500), 0);
  EXPECT_EQ(reusable_prefix(sequence_, ids(999), rule_), 500);
  EXPECT_EQ(reusable_prefix(sequence_, ids(1000), rule_), 0);
}

TEST_F(SequenceTest, SparseKeysAreNotReusedUnderADensePrompt) {
  run(ids(1500), 0);
  EXPECT_EQ(reusable_prefix(sequence_, ids(1600), rule_), 1500);
  EXPECT_EQ(reusable_prefix(sequence_, ids(999), rule_), 0);
}

TEST_F(SequenceTest, AnswerThatCrossesTheLengthIsReusedUpToThere) {
  run(ids(990), 20);  // token 999 is the first to be computed with 1000 keys
  EXPECT_EQ(sequence_.in_first_mode, 999);
  EXPECT_EQ(reusable_prefix(sequence_, ids(999), rule_), 998);
  EXPECT_EQ(reusable_prefix(sequence_, ids(1100), rule_), 0);
}

TEST_F(SequenceTest, LongRopeFactorsAreAModeToo) {
  rule_ = {.rope_switch = 600};
  run(ids(600), 0);
  EXPECT_EQ(reusable_prefix(sequence_, ids(600), rule_), 599);
  EXPECT_EQ(reusable_prefix(sequence_, ids(601), rule_), 0);
}

TEST_F(SequenceTest, TruncatingGivesPagesBack) {
  run(ids(500), 0);
  EXPECT_EQ(pool_.free_pages(), pool_.total_pages() - 8);
  sequence_.truncate(64, pool_);
  EXPECT_EQ(pool_.free_pages(), pool_.total_pages() - 1);
  EXPECT_EQ(sequence_.cached, 64);
  sequence_.truncate(0, pool_);
  EXPECT_EQ(pool_.free_pages(), pool_.total_pages());
}

}  // namespace
}  // namespace infllm::engine
