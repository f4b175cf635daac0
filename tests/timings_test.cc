// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/timings.h"

#include <gtest/gtest.h>

namespace infllm::engine {
namespace {

// By hand: 4 blocks of 16 (3 + 1 of window); token 100 has 7 causal blocks and sees 3 * 16 + 5
// keys.
TEST(Visibility, CountsBlocks) {
  const SparseConfig config{.block_size = 16, .window_size = 16, .topk = 3};
  Visibility seen;
  seen.add(100, 101, &config);
  EXPECT_EQ(seen.attended, 53);
  EXPECT_EQ(seen.causal, 101);
  Visibility early;
  early.add(0, 64, &config);
  EXPECT_EQ(early.share(), 1);
}

}  // namespace
}  // namespace infllm::engine
