// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/table.h"

#include "infllm/backend/host_memory.h"
#include "infllm/backend/reference/rows.h"

namespace infllm::reference {

const Kernels& kernels() {
  static const Kernels table = {
      .name = "reference",
      .activation = DType::kF64,
      .accumulate = DType::kF64,
      .allocate = &host_allocate,
      .copy_in = &host_copy,
      .copy_out = &host_copy,
      .kv_page_bytes = &kv_page_bytes,
      .kv_append = {&kv_append},
      .kv_read = {&kv_read},
      .compress = {&compress},
      .score = {&score, &score_workspace_bytes},
      .select = {&select},
      .attend = {&attend, &attend_workspace_bytes},
      .attend_backward = {&attend_backward, &attend_backward_workspace_bytes},
      .align = {&align, &align_workspace_bytes},
      .align_backward = {&align_backward, &align_backward_workspace_bytes},
      .pack_linear = &pack_linear,
      .linear = {&linear, &linear_workspace_bytes},
      .upload_table = &upload_table,
      .embed = {&embed},
      .rms_norm = {&rms_norm},
      .rope_tables = {&rope_tables},
      .rope = {&rope},
      .swiglu = {&swiglu},
      .gather = {&gather},
  };
  return table;
}

}  // namespace infllm::reference
