// SPDX-License-Identifier: Apache-2.0
//
// Where the gradients of a block of keys belong.
#pragma once

#include "infllm/backend/cuda/backward/choosers.h"

namespace infllm::cuda::backward {

// Entry `index` of Choosers::blocks.
struct BlockPlace {
  __device__ __forceinline__ BlockPlace(const Choosers& c, const Batch& batch, std::int64_t index)
      : block(static_cast<int>(index % c.max_blocks)),
        sequence(static_cast<int>(index / c.max_blocks % batch.num_sequences)),
        head(static_cast<int>(index / c.max_blocks / batch.num_sequences)) {}

  int block;
  int sequence;
  int head;
};

// Keys of the sequences before this one, which is where its rows of grad_k and grad_v begin. All
// lanes of a warp call it, each with its number.
__device__ inline std::int64_t keys_before(const Batch& batch, int sequence, int lane) {
  long long sum = 0;
  for (int b = lane; b < sequence; b += 32) sum += batch.kv_length[b];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

}  // namespace infllm::cuda::backward
