// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/backward.h"

#include "infllm/core/arena.h"
#include "infllm/ops/attend.h"
#include "python/bindings/forward.h"

namespace infllm::python {
namespace {

namespace nb = nanobind;

struct Backward {
  Forward forward;
  std::uintptr_t grad_o, grad_lse, grad_q, grad_k, grad_v;

  AttendBackwardParams params() const {
    return {.forward = forward.attend(),
            .grad_o = pointer(grad_o),
            .grad_lse = pointer(grad_lse),
            .grad_q = pointer(grad_q),
            .grad_k = pointer(grad_k),
            .grad_v = pointer(grad_v)};
  }
};

Status run(const Backend& backend, const Backward& b, std::span<std::byte> workspace) {
  const Forward& f = b.forward;
  INFLLM_TRY(kv_append(backend, {.pages = f.pages, .batch = f.keys, .k = f.k, .v = f.v}));
  return attend_backward(backend, b.params(), workspace);
}

}  // namespace

void bind_backward(nb::module_& module) {
  nb::class_<Backward>(module, "Backward")
      .def(
          "__init__",
          [](Backward* self, const Forward& forward, std::uintptr_t grad_o, std::uintptr_t grad_lse,
             std::uintptr_t grad_q, std::uintptr_t grad_k, std::uintptr_t grad_v) {
            new (self) Backward{forward, grad_o, grad_lse, grad_q, grad_k, grad_v};
          },
          nb::arg("forward"), nb::arg("grad_o"), nb::arg("grad_lse"), nb::arg("grad_q"),
          nb::arg("grad_k"), nb::arg("grad_v"))
      .def(
          "workspace_bytes",
          [](Backward& self, const Device& device) {
            raise_if_failed(settle(device, self.forward));
            return device.ask([&](const Backend& backend) {
              return attend_backward_workspace_bytes(backend, self.params()) + kArenaAlignment;
            });
          },
          nb::arg("device"), "Checks the arguments on a host. Call it before run().")
      .def(
          "run",
          [](const Backward& self, const Device& device, std::uintptr_t stream,
             std::uintptr_t workspace, std::size_t bytes) {
            device.run(stream, [&](const Backend& backend) {
              return run(backend, self, {pointer<std::byte>(workspace), bytes});
            });
          },
          nb::arg("device"), nb::arg("stream"), nb::arg("workspace"), nb::arg("bytes"));
}

}  // namespace infllm::python
