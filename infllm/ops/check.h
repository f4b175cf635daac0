// SPDX-License-Identifier: Apache-2.0
//
// What the operations' checks share: the parts that several steps' parameters have in common, and
// the one call through the kernel table. Messages begin with the step's name.
//
//   INFLLM_TRY(check_cache("score", params.pages, params.batch));
//   return run_cell("score", backend, backend.kernels->score, params, workspace);
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "infllm/ops/kernels.h"

namespace infllm {

// The batch's shape, the layout, and that the page table is long enough for the longest sequence.
Status check_cache(std::string_view step, const KvPages& pages, const Batch& batch);

// heads_q >= 1 query heads that divide evenly among the KV heads.
Status check_heads(std::string_view step, std::int32_t heads_q, std::int32_t heads_kv);

Status check_scale(std::string_view step, float scale);

// The config's windows and blocks are those that the pages were laid out for.
Status check_same_windows(std::string_view step, const SparseConfig& config,
                          const KvLayout& layout);

// What every step that scores pooled keys asks of its config and cache: a valid config, all
// of the above, and a cache that has pooled keys.
Status check_scoring(std::string_view step, const SparseConfig& config, const KvPages& pages,
                     const Batch& batch, std::int32_t heads_q, float scale);

inline Status check_pointer(std::string_view step, std::string_view name, const void* pointer) {
  if (pointer != nullptr) return {};
  return invalid_argument(fmt::format("{}: {} is null, expected an array", step, name));
}

template <typename Params>
std::size_t cell_workspace_bytes(const Backend& backend, const Cell<Params>& cell,
                                 const Params& params) {
  return cell.workspace_bytes == nullptr ? 0 : cell.workspace_bytes(backend, params);
}

template <typename Params>
Status run_cell(std::string_view step, const Backend& backend, const Cell<Params>& cell,
                const Params& params, std::span<std::byte> workspace) {
  if (cell.run == nullptr) {
    return unsupported(fmt::format("{}: the device \"{}\" has no such step; open another one", step,
                                   backend.name));
  }
  const std::size_t needed = cell_workspace_bytes(backend, cell, params);
  if (workspace.size() < needed) {
    return invalid_argument(
        fmt::format("{}: the workspace has {} bytes, expected {}; ask {}_workspace_bytes()", step,
                    workspace.size(), needed, step));
  }
  return cell.run(backend, params, workspace);
}

}  // namespace infllm
