// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace infllm::python {

// Backward(forward, grad_o, grad_lse, grad_q, grad_k, grad_v): appends the forward's k and v to its
// pages anew, then attend_backward.
void bind_backward(nanobind::module_& module);

}  // namespace infllm::python
