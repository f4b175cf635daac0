// SPDX-License-Identifier: Apache-2.0
#include "python/bindings/forward.h"

#include <fmt/format.h>
#include <nanobind/stl/optional.h>

#include <algorithm>

#include "infllm/core/arena.h"
#include "infllm/ops/compress.h"

namespace infllm::python {
namespace {

namespace nb = nanobind;

ScoreSelectParams choose_of(const Forward& f) {
  return {.score = {.pages = f.pages,
                    .batch = f.batch,
                    .config = *f.config,
                    .heads_q = f.heads_q,
                    .scale = f.scale,
                    .q = f.config->use_nope ? f.q_score : f.q},
          .select = {.batch = f.batch,
                     .config = *f.config,
                     .heads_kv = f.pages.layout.kv_heads,
                     .selection = f.selection}};
}

std::int64_t score_bytes(const Backend& backend, const SelectParams& p) {
  return std::int64_t{p.heads_kv} * p.batch.num_tokens * p.blocks() *
         size_of(backend.kernels->accumulate);
}

bool chooses(const Forward& f) { return f.config.has_value() && f.batch.any_sparse; }

Status choose(const Backend& backend, const Forward& f, std::span<std::byte> workspace,
              bool& in_one) {
  ScoreSelectParams p = choose_of(f);
  if (p.select.columns() != f.columns) {
    return invalid_argument(
        fmt::format("selection: {} columns, expected min(topk + window_size / block_size, blocks "
                    "of max_seqlen_k) = {}",
                    f.columns, p.select.columns()));
  }
  in_one = has_score_select(backend, p);
  if (in_one) return score_select(backend, p, workspace);
  Arena arena(workspace);
  p.score.scores = arena.take<std::byte>(score_bytes(backend, p.select));
  p.select.scores = p.score.scores;
  INFLLM_TRY(score(backend, p.score, arena.rest()));
  return select(backend, p.select);
}

std::size_t choose_bytes(const Backend& backend, const Forward& f) {
  const ScoreSelectParams p = choose_of(f);
  if (has_score_select(backend, p)) return score_select_workspace_bytes(backend, p);
  ArenaSize size;
  size.take<std::byte>(score_bytes(backend, p.select));
  size.add(score_workspace_bytes(backend, p.score));
  return size.bytes();
}

}  // namespace

AttendParams Forward::attend() const {
  return {.pages = pages,
          .batch = batch,
          .heads_q = heads_q,
          .scale = scale,
          .q = q,
          .o = o,
          .lse = lse,
          .selection = selection,
          .columns = columns};
}

Status settle(const Device& device, Forward& f) {
  if (f.k != nullptr) INFLLM_TRY(settle(device, f.pages, f.keys).with_context("keys"));
  return settle(device, f.pages, f.batch);
}

std::size_t workspace_bytes(const Backend& backend, const Forward& f) {
  std::size_t bytes = 0;
  if (f.batch.num_tokens == 0) return bytes;
  if (chooses(f)) bytes = choose_bytes(backend, f);
  if (f.o != nullptr) bytes = std::max(bytes, attend_workspace_bytes(backend, f.attend()));
  return bytes + kArenaAlignment;
}

Status run(const Backend& backend, const Forward& f, std::span<std::byte> workspace) {
  if (f.k != nullptr) {
    INFLLM_TRY(kv_append(
        backend, {.pages = f.pages, .batch = f.keys, .k = f.k, .v = f.v, .k_score = f.k_score}));
    if (f.pages.layout.pooled_keys) {
      INFLLM_TRY(compress(backend, {.pages = f.pages, .batch = f.keys}));
    }
  }
  bool in_one = false;
  if (chooses(f)) INFLLM_TRY(choose(backend, f, workspace, in_one));
  if (f.o == nullptr) return {};
  AttendParams p = f.attend();
  if (in_one) p.follows_select = &*f.config;
  return attend(backend, p, workspace);
}

void bind_forward(nb::module_& module) {
  nb::class_<Forward>(module, "Forward")
      .def(
          "__init__",
          [](Forward* self, const KvPages& pages, const Batch& keys, const Batch& batch,
             std::optional<SparseConfig> config, std::int32_t heads_q, float scale,
             std::uintptr_t k, std::uintptr_t v, std::uintptr_t k_score, std::uintptr_t q,
             std::uintptr_t q_score, std::uintptr_t o, std::uintptr_t lse, std::uintptr_t selection,
             std::int32_t columns) {
            new (self) Forward{.pages = pages,
                               .keys = keys,
                               .batch = batch,
                               .config = config,
                               .heads_q = heads_q,
                               .scale = scale,
                               .k = pointer(k),
                               .v = pointer(v),
                               .k_score = pointer(k_score),
                               .q = pointer(q),
                               .q_score = pointer(q_score),
                               .o = pointer(o),
                               .lse = pointer(lse),
                               .selection = pointer<std::int32_t>(selection),
                               .columns = columns};
          },
          nb::arg("pages"), nb::arg("keys"), nb::arg("batch"), nb::arg("config").none(),
          nb::arg("heads_q"), nb::arg("scale"), nb::arg("k") = 0, nb::arg("v") = 0,
          nb::arg("k_score") = 0, nb::arg("q") = 0, nb::arg("q_score") = 0, nb::arg("o") = 0,
          nb::arg("lse") = 0, nb::arg("selection") = 0, nb::arg("columns") = 0)
      .def(
          "workspace_bytes",
          [](Forward& self, const Device& device) {
            raise_if_failed(settle(device, self));
            return device.ask([&](const Backend& b) { return workspace_bytes(b, self); });
          },
          nb::arg("device"), "Checks the arguments on a host. Call it before run().")
      .def(
          "run",
          [](const Forward& self, const Device& device, std::uintptr_t stream,
             std::uintptr_t workspace, std::size_t bytes) {
            device.run(stream, [&](const Backend& backend) {
              return run(backend, self, {pointer<std::byte>(workspace), bytes});
            });
          },
          nb::arg("device"), nb::arg("stream"), nb::arg("workspace"), nb::arg("bytes"));
}

}  // namespace infllm::python
