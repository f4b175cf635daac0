// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/align.h"

#include "infllm/core/arena.h"
#include "infllm/ops/align.h"
#include "python/bindings/arguments.h"

namespace infllm::python {
namespace {

namespace nb = nanobind;

std::span<std::byte> memory(std::uintptr_t workspace, std::size_t bytes) {
  return {pointer<std::byte>(workspace), bytes};
}

void bind_forward_pass(nb::module_& module) {
  nb::class_<AlignParams>(module, "Align")
      .def(
          "__init__",
          [](AlignParams* self, const KvPages& pages, const Batch& batch,
             const SparseConfig& config, std::int32_t heads_q, float scale, std::uintptr_t q,
             std::uintptr_t q_score, std::uintptr_t rows, std::int32_t num_rows,
             std::uintptr_t loss, std::uintptr_t norms, std::uintptr_t grad_scores,
             std::uintptr_t windows) {
            new (self) AlignParams{.pages = pages,
                                   .batch = batch,
                                   .config = config,
                                   .heads_q = heads_q,
                                   .scale = scale,
                                   .q = pointer(q),
                                   .q_score = pointer(q_score),
                                   .rows = pointer<const std::int32_t>(rows),
                                   .num_rows = num_rows,
                                   .loss = pointer(loss),
                                   .norms = pointer(norms),
                                   .grad_scores = pointer(grad_scores),
                                   .windows = pointer<std::int32_t>(windows)};
          },
          nb::arg("pages"), nb::arg("batch"), nb::arg("config"), nb::arg("heads_q"),
          nb::arg("scale"), nb::arg("q"), nb::arg("q_score"), nb::arg("rows"), nb::arg("num_rows"),
          nb::arg("loss"), nb::arg("norms"), nb::arg("grad_scores"), nb::arg("windows"))
      .def(
          "workspace_bytes",
          [](AlignParams& self, const Device& device) {
            raise_if_failed(settle(device, self.pages, self.batch));
            return device.ask([&](const Backend& backend) {
              return align_workspace_bytes(backend, self) + kArenaAlignment;
            });
          },
          nb::arg("device"), "Checks the arguments on a host. Call it before run().")
      .def(
          "run",
          [](const AlignParams& self, const Device& device, std::uintptr_t stream,
             std::uintptr_t workspace, std::size_t bytes) {
            device.run(stream, [&](const Backend& backend) {
              return align(backend, self, memory(workspace, bytes));
            });
          },
          nb::arg("device"), nb::arg("stream"), nb::arg("workspace"), nb::arg("bytes"));
}

}  // namespace

void bind_align(nb::module_& module) {
  bind_forward_pass(module);
  nb::class_<AlignBackwardParams>(module, "AlignBackward")
      .def(
          "__init__",
          [](AlignBackwardParams* self, const AlignParams& forward, std::uintptr_t grad_loss,
             std::uintptr_t grad_q, std::uintptr_t grad_k) {
            new (self) AlignBackwardParams{.forward = forward,
                                           .grad_loss = pointer(grad_loss),
                                           .grad_q = pointer(grad_q),
                                           .grad_k = pointer(grad_k)};
          },
          nb::arg("forward"), nb::arg("grad_loss"), nb::arg("grad_q"), nb::arg("grad_k"))
      .def(
          "workspace_bytes",
          [](AlignBackwardParams& self, const Device& device) {
            raise_if_failed(settle(device, self.forward.pages, self.forward.batch));
            return device.ask([&](const Backend& backend) {
              return align_backward_workspace_bytes(backend, self) + kArenaAlignment;
            });
          },
          nb::arg("device"), "Checks the arguments on a host. Call it before run().")
      .def(
          "run",
          [](const AlignBackwardParams& self, const Device& device, std::uintptr_t stream,
             std::uintptr_t workspace, std::size_t bytes) {
            device.run(stream, [&](const Backend& backend) {
              return align_backward(backend, self, memory(workspace, bytes));
            });
          },
          nb::arg("device"), nb::arg("stream"), nb::arg("workspace"), nb::arg("bytes"));
}

}  // namespace infllm::python
