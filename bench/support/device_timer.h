// SPDX-License-Identifier: Apache-2.0
//
// Times steps on a device: the body is run once, recorded, and its graph replayed back to back, so
// that neither launches nor waiting for them are part of the number. A body that cannot be recorded
// is run instead.
//
//   Timing t = INFLLM_TRY(time_steps(backend, 5, [&] { return attend(backend, p, workspace); }));
#pragma once

#include <functional>

#include "bench/support/timing.h"
#include "infllm/core/status.h"
#include "infllm/ops/backend.h"

namespace infllm::bench {

// `repetitions` measurements, each of as many replays as take some milliseconds.
Result<Timing> time_steps(const Backend& backend, int repetitions,
                          const std::function<Status()>& body);

// What the device can do, measured with its own steps: a product of bf16 matrices of 8192, and
// copying 2 GiB, bytes read and written counted.
struct DevicePeak {
  double flops = 0;
  double bandwidth = 0;
};
Result<DevicePeak> device_peak(const Backend& backend);

}  // namespace infllm::bench
