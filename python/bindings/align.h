// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace infllm::python {

// Align(...) and AlignBackward(align, ...): ops/align.h over pages that are appended and pooled.
void bind_align(nanobind::module_& module);

}  // namespace infllm::python
