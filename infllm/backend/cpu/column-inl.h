// SPDX-License-Identifier: Apache-2.0
//
// The cpu column of the grid for one instruction set: all rows, and their table.
#pragma once

#include "infllm/backend/cpu/align-inl.h"
#include "infllm/backend/cpu/align_backward-inl.h"
#include "infllm/backend/cpu/attend-inl.h"
#include "infllm/backend/cpu/attend_backward-inl.h"
#include "infllm/backend/cpu/compress-inl.h"
#include "infllm/backend/cpu/host.h"
#include "infllm/backend/cpu/kv_cache-inl.h"
#include "infllm/backend/cpu/layout.h"
#include "infllm/backend/cpu/linear-inl.h"
#include "infllm/backend/cpu/linear_pack.h"
#include "infllm/backend/cpu/score-inl.h"
#include "infllm/backend/cpu/select-inl.h"
#include "infllm/backend/cpu/transformer-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

const Kernels& kernels() {
  static const Kernels table = {
      .activation = DType::kF32,
      .accumulate = DType::kF32,
      .allocate = &host_allocate,
      .copy_in = &host_copy,
      .copy_out = &host_copy,
      .check_layout = &check_layout,
      .kv_page_bytes = &page_bytes,
      .kv_append = {&run_kv_append},
      .kv_read = {&run_kv_read},
      .compress = {&run_compress},
      .score = {&run_score, &score_bytes},
      .select = {&run_select},
      .attend = {&run_attend, &attend_bytes},
      .attend_backward = {&run_attend_backward, &attend_backward_bytes},
      .align = {&run_align, &align_bytes},
      .align_backward = {&run_align_backward, &align_backward_bytes},
      .pack_linear = &cpu::pack_linear,
      .linear = {&run_linear, &linear_workspace},
      .upload_table = &cpu::upload_table,
      .embed = {&run_embed},
      .rms_norm = {&run_rms_norm},
      .rope_tables = {&run_rope_tables},
      .rope = {&run_rope},
      .swiglu = {&run_swiglu},
      .gather = {&run_gather},
  };
  return table;
}

INFLLM_CPU_END
