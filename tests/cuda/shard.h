// SPDX-License-Identifier: Apache-2.0
//
// Cases of one program in several processes: with GTEST_TOTAL_SHARDS and GTEST_SHARD_INDEX in the
// environment, as GoogleTest knows them, a process takes every so many-th case.
//
//   for (const Case& c : cases()) {
//     if (wanted(c) && next_is_mine()) check(c);
//   }
#pragma once

#include <cstdlib>

namespace infllm::cuda {

// To be asked once for each case, in the same order in every process.
inline bool next_is_mine() {
  static const auto number = [](const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::atoi(text);
  };
  static const int total = number("GTEST_TOTAL_SHARDS", 1), index = number("GTEST_SHARD_INDEX", 0);
  static int count = 0;
  return count++ % total == index;
}

}  // namespace infllm::cuda
