// SPDX-License-Identifier: Apache-2.0
//
// From the library's errors as values to Python's exceptions: ValueError for what the caller
// passed, NotImplementedError for what a device cannot do, MemoryError, and RuntimeError for the
// rest.
#pragma once

#include <utility>

#include "infllm/core/status.h"

namespace infllm::python {

// Both need the interpreter's lock.
void raise_if_failed(const Status& status);

template <typename T>
T value_or_raise(Result<T> result) {
  raise_if_failed(result.status());
  return std::move(result).value();
}

}  // namespace infllm::python
