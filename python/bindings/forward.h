// SPDX-License-Identifier: Apache-2.0
//
// The whole switchable operation, and its parts: what is null is left out.
//
//   append    k: the step's keys and values go into the pages (and are pooled, if those have room)
//   choose    config: score and select into `selection`
//   attend    o: over `selection`, or over everything where that is null
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "infllm/ops/attend.h"
#include "infllm/ops/score_select.h"
#include "python/bindings/arguments.h"

namespace infllm::python {

struct Forward {
  KvPages pages;
  Batch keys;   // whose tokens are k and v
  Batch batch;  // whose tokens are q
  std::optional<SparseConfig> config;
  std::int32_t heads_q = 0;
  float scale = 0;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* k_score = nullptr;
  const void* q = nullptr;
  const void* q_score = nullptr;
  void* o = nullptr;
  void* lse = nullptr;
  std::int32_t* selection = nullptr;
  std::int32_t columns = 0;

  AttendParams attend() const;
};

// On a host settle() comes first.
Status settle(const Device& device, Forward& forward);

std::size_t workspace_bytes(const Backend& backend, const Forward& forward);
Status run(const Backend& backend, const Forward& forward, std::span<std::byte> workspace);

void bind_forward(nanobind::module_& module);

}  // namespace infllm::python
