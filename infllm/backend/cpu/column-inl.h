// SPDX-License-Identifier: Apache-2.0
//
// The cpu column of the grid for one instruction set: all rows, and their table.
#pragma once

#include "infllm/backend/cpu/dot-inl.h"
#include "infllm/backend/cpu/host.h"
#include "infllm/backend/cpu/linear-inl.h"
#include "infllm/backend/cpu/linear_pack.h"
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
      .pack_linear = &cpu::pack_linear,
      .linear = {&run_linear, &linear_workspace},
      .upload_table = &cpu::upload_table,
      .embed = {&run_embed},
      .rms_norm = {&run_rms_norm},
      .rope = {&run_rope},
      .swiglu = {&run_swiglu},
      .gather = {&run_gather},
  };
  return table;
}

INFLLM_CPU_END
