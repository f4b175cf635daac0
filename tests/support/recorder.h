// SPDX-License-Identifier: Apache-2.0
//
// A backend on the host that records steps as a device does: while record() runs, each step's
// parameters are copied and nothing is computed; replay() runs the copies. Whatever a recorded step
// takes from the host instead of from its arrays is stale on replay, and shows in the result.
//
//   Recorder recorder;                                // over "reference"
//   model::Model model = load_golden(recorder.backend(), ...);
//   EXPECT_GT(recorder.replays(), 0);
#pragma once

#include "infllm/ops/kernels.h"

namespace infllm::testing {

// One at a time: its table is static, as tables are.
class Recorder {
 public:
  Recorder();
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  const Backend& backend() const { return backend_; }
  int recorded() const;  // graphs
  int replays() const;
  int rows_ranked() const;  // by its top_logits, which looks at rows in float64

 private:
  Backend backend_;
};

}  // namespace infllm::testing
