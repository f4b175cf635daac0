// SPDX-License-Identifier: Apache-2.0
//
// Steps 2 to 4 in one: from queries to outputs (ops/score_select.h, ops/attend.h say what they
// are). A column has this for shapes where a launch between choosing and attending costs more than
// it is worth. The result is the same selection and the same attention over it.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"
#include "infllm/ops/score_select.h"

namespace infllm {

struct SelectAttendParams {
  ScoreSelectParams choose;
  AttendParams attend;  // of the same batch; attend.selection is choose.select.selection
  // The pages held all but the step's own tokens, and the windows that end with them, before the
  // batch was copied to the device. One may then read the rest before the call in front has ended.
  bool settled = false;
};

// Whether the backend has this step for parameters of this shape; if not, run score_select() (or
// score() and select()) and attend().
bool has_select_attend(const Backend& backend, const SelectAttendParams& params);

Status select_attend(const Backend& backend, const SelectAttendParams& params,
                     std::span<std::byte> workspace);
std::size_t select_attend_workspace_bytes(const Backend& backend, const SelectAttendParams& params);

}  // namespace infllm
