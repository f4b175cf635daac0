// SPDX-License-Identifier: Apache-2.0
//
// Which kernel a call needs, as its launcher asks.
//
//   return with_shape(params.pages.layout, [&]<typename T, int D>() {
//     return start("attend", attend_kernel<T, D>, grid, threads, bytes, stream, args);
//   });
#pragma once

#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/ops/attend.h"

namespace infllm::cuda {

// body.template operator()<T, D>() with the element type and head dimension of a layout that
// check_layout (rows.h) lets through.
template <typename Body>
auto with_shape(const KvLayout& layout, Body&& body) {
  return with_type(layout.dtype, [&]<typename T>(T) {
    return layout.head_dim == 128 ? body.template operator()<T, 128>()
                                  : body.template operator()<T, 64>();
  });
}

// Whether some sequence may attend to its selection; otherwise all of them are dense.
inline bool is_sparse(const AttendParams& params) {
  return params.selection != nullptr && params.batch.any_sparse;
}

}  // namespace infllm::cuda
