// SPDX-License-Identifier: Apache-2.0
//
// Products of one token, one after another in one kernel: as fast as the weights come out of
// memory, without a pause between them.
//
//   y = alpha W f(x) + beta y           f: as it is, or RMS-normalised
//   y = silu(G x) (U x)                 two halves of one matrix
//
// A product may read what earlier ones of its chain wrote. Its weights are on their way long before
// that: they depend on nothing, neither on the products nor on the kernel in front.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/backend/cuda/device.h"
#include "infllm/ops/transformer.h"

namespace infllm::cuda::sm90 {

struct StreamProduct {
  const LinearWeight* weight = nullptr;
  const void* x = nullptr;            // [inputs]
  const void* norm_weight = nullptr;  // [inputs] float; null: x as it is
  void* y = nullptr;                  // [outputs], of gated ones half as many
  float alpha = 1;
  float beta = 0;
  bool gated = false;  // first half of the outputs: gate, second half: up
};

inline constexpr std::size_t kMostStreamed = 4;  // products of a chain

// Rows of W of whole 16-byte units, at most 16384 inputs. x must begin at such a unit too.
bool streams(const LinearWeight& weight);

// With more than one product all thread blocks must find room on the device at the same time, which
// they do unless another stream keeps a part of it for good.
Status stream(const Device& device, DType activation, std::span<const StreamProduct> products,
              float epsilon);

}  // namespace infllm::cuda::sm90
