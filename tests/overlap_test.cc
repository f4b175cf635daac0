// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/overlap.h"

#include <gtest/gtest.h>

#include <vector>

namespace infllm::testing {
namespace {

// One block of sink and a local window of two. The tokens are the first of block 10.
constexpr SparseConfig kConfig{.init_blocks = 1, .window_size = 64, .topk = 5};

double overlap(const std::vector<std::int32_t>& selection, std::int32_t heads,
               std::int64_t tokens) {
  const auto columns = static_cast<std::int64_t>(selection.size()) / (heads * tokens);
  return neighbours_overlap(kConfig, selection, heads, tokens, columns, 64 * 10 + tokens);
}

TEST(Overlap, CountsWhatIsChosenFreely) {
  // Sink 0 and local blocks 9 and 10 are everybody's and do not count.
  EXPECT_EQ(overlap({0, 2, 3, 4, 9, 10, 0, 2, 3, 4, 9, 10}, 1, 2), 1.0);
  EXPECT_EQ(overlap({0, 2, 3, 4, 9, 10, 0, 5, 6, 7, 9, 10}, 1, 2), 0.0);
  EXPECT_EQ(overlap({0, 2, 3, 4, 9, 10, 0, 1, 3, 8, 9, 10}, 1, 2), 1.0 / 3);
}

TEST(Overlap, HeadsAreNoNeighbours) {
  EXPECT_EQ(overlap({0, 2, 3, 9, 10, 0, 2, 4, 9, 10,  //
                     0, 5, 6, 9, 10, 0, 5, 6, 9, 10},
                    2, 2),
            3.0 / 4);
}

TEST(Overlap, RowsMayEndEarlyOrChooseNothing) {
  EXPECT_EQ(overlap({0, 2, 9, 10, -1, 0, 2, 3, 9, 10}, 1, 2), 1.0 / 2);
  EXPECT_EQ(overlap({0, 9, 10, 0, 9, 10}, 1, 2), 1.0);
  EXPECT_EQ(overlap({0, 2, 9, 10}, 1, 1), 1.0);
}

}  // namespace
}  // namespace infllm::testing
