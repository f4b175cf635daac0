// SPDX-License-Identifier: Apache-2.0
//
// Bad input is refused with words: what tests of refusals read.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "infllm/core/status.h"

namespace infllm::testing {

// Of a Status or Result that must have failed.
inline std::string message_of(const Status& status) {
  EXPECT_FALSE(status.ok());
  return status.message();
}
template <typename T>
std::string message_of(const Result<T>& result) {
  return message_of(result.status());
}

}  // namespace infllm::testing
