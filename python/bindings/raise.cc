// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/raise.h"

#include <nanobind/nanobind.h>

namespace infllm::python {
namespace {

PyObject* exception_of(StatusCode code) {
  switch (code) {
    case StatusCode::kInvalidArgument:
      return PyExc_ValueError;
    case StatusCode::kUnsupported:
      return PyExc_NotImplementedError;
    case StatusCode::kResourceExhausted:
      return PyExc_MemoryError;
    default:
      return PyExc_RuntimeError;
  }
}

}  // namespace

void raise_if_failed(const Status& status) {
  if (status.ok()) return;
  PyErr_SetString(exception_of(status.code()), status.message().c_str());
  throw nanobind::python_error();
}

}  // namespace infllm::python
