// SPDX-License-Identifier: Apache-2.0
//
// The way there, in four kernels. target.cu walks the keys twice: first for the maxima and sums of
// dense soft-max, in splits of the keys that the second pass adds up in their order, then for the
// masses of choosable blocks. score.cu walks the pooled keys: the normaliser, then 64 windows at a
// time, whose logits go through shared memory to be added up over the group. What a row needs of
// all its blocks at once, align.cu does, a warp a row.
#pragma once

#include "infllm/backend/cuda/align/rows.cuh"

namespace infllm::cuda::align {

struct ForwardArgs {
  AlignArgs a;
  float2* partials;  // [splits, Hkv, R, G] maximum and sum
  float* scores;     // [Hkv, R, N] R
  float* loss;       // [Hkv, R]
  int splits;
};

// Writes a.grad_scores = A, the group's mean mass of every choosable block under dense attention.
Status find_target(const KvLayout& layout, cudaStream_t stream, const ForwardArgs& args);

// Writes the scores of choosable blocks (base 2), a.windows and a.norms.
Status score_blocks(const KvLayout& layout, cudaStream_t stream, const ForwardArgs& args);

}  // namespace infllm::cuda::align
