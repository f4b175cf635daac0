// SPDX-License-Identifier: Apache-2.0
//
// What a test takes for granted. A Status that failed fails the running test with its message; a
// Result without a value ends that test, and no other: the library's own value() would abort the
// program, and with it every test behind this one.
//
//   const Buffer memory = must(allocate(backend, bytes));
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>
#include <utility>

#include "infllm/core/status.h"

namespace infllm::testing {

inline void must(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

// GoogleTest reports the exception as a failure of the test that it left.
template <typename T>
T must(Result<T> result) {
  if (!result.ok()) throw std::runtime_error(result.status().message());
  return std::move(result).value();
}

}  // namespace infllm::testing
