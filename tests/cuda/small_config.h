// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "infllm/ops/sparse_config.h"

namespace infllm::cuda {

// A budget of 6 blocks, 2 of them local before the own one; always sparse.
inline SparseConfig small_config() {
  SparseConfig config;
  config.window_size = 128;
  config.topk = 4;
  config.dense_len = -1;
  return config;
}

}  // namespace infllm::cuda
