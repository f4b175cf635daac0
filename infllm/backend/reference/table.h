// SPDX-License-Identifier: Apache-2.0
//
// The float64 column: plain loops, as close to the equations as C++ allows. It is the truth that
// the other columns are tested against, and a backend like any other.
#pragma once

#include "infllm/ops/kernels.h"

namespace infllm::reference {

const Kernels& kernels();

}  // namespace infllm::reference
