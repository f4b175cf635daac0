// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace infllm::python {

// The steps of ops/ alone, as functions: append, read_pooled, score, select.
void bind_steps(nanobind::module_& module);

}  // namespace infllm::python
