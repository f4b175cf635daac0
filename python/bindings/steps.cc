// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/steps.h"

#include "infllm/core/arena.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/score.h"
#include "infllm/ops/select.h"
#include "python/bindings/arguments.h"

namespace infllm::python {
namespace {

namespace nb = nanobind;

void append(const Device& device, std::uintptr_t stream, const KvPages& pages, Batch batch,
            std::uintptr_t k, std::uintptr_t v, std::uintptr_t k_score) {
  raise_if_failed(settle(device, pages, batch));
  device.run(stream, [&](const Backend& backend) -> Status {
    INFLLM_TRY(kv_append(backend, {.pages = pages,
                                   .batch = batch,
                                   .k = pointer(k),
                                   .v = pointer(v),
                                   .k_score = pointer(k_score)}));
    return pages.layout.pooled_keys ? compress(backend, {.pages = pages, .batch = batch})
                                    : Status();
  });
}

void read_pooled(const Device& device, std::uintptr_t stream, const KvPages& pages, Batch batch,
                 std::uintptr_t fine, std::uintptr_t coarse) {
  raise_if_failed(settle(device, pages, batch));
  device.run(stream, [&](const Backend& backend) {
    return kv_read(
        backend,
        {.pages = pages, .batch = batch, .fine = pointer(fine), .coarse = pointer(coarse)});
  });
}

ScoreParams score_of(const KvPages& pages, const Batch& batch, const SparseConfig& config,
                     std::int32_t heads_q, float scale) {
  return {.pages = pages, .batch = batch, .config = config, .heads_q = heads_q, .scale = scale};
}

std::size_t score_bytes(const Device& device, const KvPages& pages, const Batch& batch,
                        const SparseConfig& config, std::int32_t heads_q, float scale) {
  return device.ask([&](const Backend& backend) {
    return score_workspace_bytes(backend, score_of(pages, batch, config, heads_q, scale)) +
           kArenaAlignment;
  });
}

void run_score(const Device& device, std::uintptr_t stream, const KvPages& pages, Batch batch,
               const SparseConfig& config, std::int32_t heads_q, float scale, std::uintptr_t q,
               std::uintptr_t scores, std::uintptr_t workspace, std::size_t bytes) {
  raise_if_failed(settle(device, pages, batch));
  ScoreParams params = score_of(pages, batch, config, heads_q, scale);
  params.q = pointer(q);
  params.scores = pointer(scores);
  device.run(stream, [&](const Backend& backend) {
    return score(backend, params, {pointer<std::byte>(workspace), bytes});
  });
}

void run_select(const Device& device, std::uintptr_t stream, const Batch& batch,
                const SparseConfig& config, std::int32_t heads_kv, std::uintptr_t scores,
                std::uintptr_t selection) {
  device.run(stream, [&](const Backend& backend) {
    return select(backend, {.batch = batch,
                            .config = config,
                            .heads_kv = heads_kv,
                            .scores = pointer(scores),
                            .selection = pointer<std::int32_t>(selection)});
  });
}

}  // namespace

void bind_steps(nb::module_& module) {
  module.def("append", &append, nb::arg("device"), nb::arg("stream"), nb::arg("pages"),
             nb::arg("batch"), nb::arg("k"), nb::arg("v"), nb::arg("k_score"));
  module.def("read_pooled", &read_pooled, nb::arg("device"), nb::arg("stream"), nb::arg("pages"),
             nb::arg("batch"), nb::arg("fine"), nb::arg("coarse"));
  module.def("score_workspace_bytes", &score_bytes, nb::arg("device"), nb::arg("pages"),
             nb::arg("batch"), nb::arg("config"), nb::arg("heads_q"), nb::arg("scale"));
  module.def("score", &run_score, nb::arg("device"), nb::arg("stream"), nb::arg("pages"),
             nb::arg("batch"), nb::arg("config"), nb::arg("heads_q"), nb::arg("scale"),
             nb::arg("q"), nb::arg("scores"), nb::arg("workspace"), nb::arg("bytes"));
  module.def("select", &run_select, nb::arg("device"), nb::arg("stream"), nb::arg("batch"),
             nb::arg("config"), nb::arg("heads_kv"), nb::arg("scores"), nb::arg("selection"));
}

}  // namespace infllm::python
