// SPDX-License-Identifier: Apache-2.0
//
// linear (ops/transformer.h) for one token, the product of a decode step: as fast as the weights
// come out of memory. Each thread block streams its share of the rows of W through a ring in shared
// memory with the copy engine, so that reading never pauses, and begins to before the kernel in
// front has finished: nobody writes weights.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/transformer.h"

namespace infllm::cuda::sm90 {

// One token; rows of W of whole 16-byte units, at most 16384 inputs. x must begin at such a unit
// too.
bool multiplies(const LinearParams& params);

// Whether linear() can take x through rms_norm() and the product through swiglu(), where they are
// asked for. Every block normalises for itself, which is faster than to wait for another kernel.
bool fuses(const LinearParams& params);

Status linear(const Backend& backend, const LinearParams& params, std::span<std::byte> workspace);

}  // namespace infllm::cuda::sm90
