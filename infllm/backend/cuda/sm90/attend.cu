// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"
#include "infllm/backend/cuda/sm90/attend_shapes.h"

namespace infllm::cuda::sm90 {

bool attends(const AttendParams& p) { return is_sparse(p) ? covers(p, 4, 32) : covers(p, 1, 64); }

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  return for_each_config<AttendConfig>(params, [&]<class C>() {
    return run_attend<C>(params, workspace, device.stream, device.sm_count);
  });
}

std::size_t attend_bytes(const Backend&, const AttendParams& params) {
  return attend_bytes_of<AttendConfig>(params);
}

}  // namespace infllm::cuda::sm90
