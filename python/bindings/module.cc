// SPDX-License-Identifier: Apache-2.0
//
// infllm._native: the operations of infllm/ops on addresses that the Python side owns. It knows
// nothing of PyTorch, so one build serves every version of it.
#include <nanobind/nanobind.h>

#include "python/bindings/align.h"
#include "python/bindings/arguments.h"
#include "python/bindings/backward.h"
#include "python/bindings/device.h"
#include "python/bindings/forward.h"
#include "python/bindings/steps.h"

NB_MODULE(_native, module) {
  nanobind::set_leak_warnings(false);  // opened devices live as long as the process
  infllm::python::bind_device(module);
  infllm::python::bind_arguments(module);
  infllm::python::bind_forward(module);
  infllm::python::bind_backward(module);
  infllm::python::bind_steps(module);
  infllm::python::bind_align(module);
}
