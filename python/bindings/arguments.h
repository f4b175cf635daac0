// SPDX-License-Identifier: Apache-2.0
//
// What the steps are given, made from Python's numbers: addresses arrive as integers, types by
// name.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "infllm/ops/kv_cache.h"
#include "python/bindings/device.h"

namespace infllm::python {

template <typename T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Of a host: looks into the batch's arrays, refuses what does not hold together, and replaces the
// caller's bounds by what is there. Elsewhere nothing.
Status settle(const Device& device, const KvPages& pages, Batch& batch);

void bind_arguments(nanobind::module_& module);

}  // namespace infllm::python
