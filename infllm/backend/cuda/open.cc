// SPDX-License-Identifier: Apache-2.0
//
// The tables of the CUDA columns, and which of them a device runs.
#include "infllm/backend/cuda/open.h"

#include <fmt/format.h>

#include <charconv>

#include "infllm/backend/cuda/align/align.h"
#include "infllm/backend/cuda/backward/attend_backward.h"
#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/row_stream.h"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/memory.h"
#include "infllm/backend/cuda/rows.h"
#include "infllm/backend/cuda/sm80/attend.h"
#include "infllm/backend/cuda/sm80/score.h"
#include "infllm/backend/cuda/sm80/select.h"
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_backward.h"
#include "infllm/backend/cuda/sm90/linear.h"
#include "infllm/backend/cuda/sm90/score_select.h"

namespace infllm::cuda {
namespace {

template <DType kType>
Status check_layout_of(const KvLayout& layout) {
  return check_layout(layout, kType);
}

// The cells that choose among kernels: decode's where every sequence has one token, then Hopper's
// own, then the general ones, which take every shape that check_layout lets through.
Status general_attend(const Backend& backend, const AttendParams& p, Workspace workspace) {
  return decode::attends(backend, p) ? decode::attend_in_splits(backend, p, workspace)
                                     : sm80::attend(backend, p, workspace);
}

std::size_t general_attend_bytes(const Backend& backend, const AttendParams& p) {
  return decode::attends(backend, p) ? decode::attend_bytes(backend, p)
                                     : sm80::attend_bytes(backend, p);
}

Status hopper_attend(const Backend& backend, const AttendParams& p, Workspace workspace) {
  if (decode::attends(backend, p)) return decode::attend_in_clusters(backend, p, workspace);
  return sm90::attends(p) ? sm90::attend(backend, p, workspace)
                          : sm80::attend(backend, p, workspace);
}

std::size_t hopper_attend_bytes(const Backend& backend, const AttendParams& p) {
  if (decode::attends(backend, p)) return decode::attend_bytes(backend, p);
  return sm90::attends(p) ? sm90::attend_bytes(backend, p) : sm80::attend_bytes(backend, p);
}

Status hopper_attend_backward(const Backend& backend, const AttendBackwardParams& p,
                              Workspace workspace) {
  return sm90::attends_backward(p) ? sm90::attend_backward(backend, p, workspace)
                                   : backward::attend_backward(backend, p, workspace);
}

std::size_t hopper_attend_backward_bytes(const Backend& backend, const AttendBackwardParams& p) {
  return sm90::attends_backward(p) ? sm90::attend_backward_bytes(backend, p)
                                   : backward::attend_backward_bytes(backend, p);
}

Status hopper_score_select(const Backend& backend, const ScoreSelectParams& p,
                           Workspace workspace) {
  return decode::scores(backend, p) ? decode::score_select_in_clusters(backend, p, workspace)
                                    : sm90::score_select(backend, p, workspace);
}

std::size_t hopper_score_select_bytes(const Backend& backend, const ScoreSelectParams& p) {
  return decode::scores(backend, p) ? decode::score_select_bytes(backend, p)
                                    : sm90::score_select_bytes(backend, p);
}

bool hopper_score_selects(const Backend& backend, const ScoreSelectParams& p) {
  return decode::scores(backend, p) || sm90::score_selects(backend, p);
}

// Few rows have sixteen multiprocessors each, more of them a few or one.
bool hopper_select_attends(const Backend& backend, const SelectAttendParams& p) {
  return decode::select_attends(backend, p) || decode::streams_rows(backend, p);
}

Status hopper_select_attend(const Backend& backend, const SelectAttendParams& p,
                            Workspace workspace) {
  return decode::select_attends(backend, p) ? decode::select_attend(backend, p, workspace)
                                            : decode::stream_rows(backend, p, workspace);
}

bool is_aligned(const void* x) { return reinterpret_cast<std::uintptr_t>(x) % 16 == 0; }

Status hopper_linear(const Backend& backend, const LinearParams& p, Workspace workspace) {
  return sm90::multiplies(p) && is_aligned(p.x) ? sm90::linear(backend, p, workspace)
                                                : cuda::linear(backend, p, workspace);
}

bool hopper_fuses(const Backend&, const LinearParams& p) {
  return sm90::fuses(p) && is_aligned(p.x);
}

std::size_t hopper_linear_bytes(const Backend& backend, const LinearParams& p) {
  return sm90::multiplies(p) ? 0 : cuda::linear_workspace_bytes(backend, p);
}

// What every architecture runs from Ampere on.
template <DType kType>
Kernels general() {
  return {
      .name = kType == DType::kF16 ? "sm80:f16" : "sm80",
      .activation = kType,
      .accumulate = DType::kF32,
      .allocate = &allocate,
      .allocate_visible = &allocate_visible,
      .copy_in = &copy_in,
      .copy_out = &copy_out,
      .device_info = &device_info,
      .synchronize = &synchronize,
      .record = &record,
      .replay = &replay,
      .check_layout = &check_layout_of<kType>,
      .kv_page_bytes = &kv_page_bytes,
      .kv_append = {&kv_append},
      .kv_read = {&kv_read},
      .compress = {&compress},
      .score = {&sm80::score, &sm80::score_bytes},
      .select = {&sm80::select},
      .score_select = {&decode::score_select_in_phases, &decode::score_select_bytes,
                       &decode::scores},
      .attend = {&general_attend, &general_attend_bytes},
      .attend_backward = {&backward::attend_backward, &backward::attend_backward_bytes},
      .align = {&align::align, &align::align_bytes},
      .align_backward = {&align::align_backward, &align::align_backward_bytes},
      .pack_linear = &pack_linear,
      .linear = {&linear, &linear_workspace_bytes},
      .upload_table = &upload_table,
      .embed = {&embed},
      .rms_norm = {&rms_norm},
      .rope_tables = {&rope_tables},
      .rope = {&rope},
      .rope_append = {&rope_append, nullptr, &rope_append_pools},
      .swiglu = {&swiglu},
      .gather = {&gather},
      .top_logits = {&top_logits, &top_logits_bytes},
  };
}

// The general table with the rows that Hopper has of its own.
template <DType kType>
Kernels hopper() {
  Kernels table = general<kType>();
  table.name = kType == DType::kF16 ? "sm90:f16" : "sm90";
  table.score_select = {&hopper_score_select, &hopper_score_select_bytes, &hopper_score_selects};
  table.attend = {&hopper_attend, &hopper_attend_bytes};
  table.attend_backward = {&hopper_attend_backward, &hopper_attend_backward_bytes};
  table.select_attend = {&hopper_select_attend, nullptr, &hopper_select_attends};
  table.linear = {&hopper_linear, &hopper_linear_bytes, &hopper_fuses};
  return table;
}

struct Column {
  int capability;        // that its machine code is for
  bool later_ones;       // runs on newer devices too
  const Kernels& table;  // whose name ends the backend's

  bool runs_on(int device) const {
    return later_ones ? device >= capability : device == capability;
  }
};

// Slowest first.
std::span<const Column> columns() {
  static const Kernels tables[] = {general<DType::kF16>(), general<DType::kBF16>(),
                                   hopper<DType::kF16>(), hopper<DType::kBF16>()};
  static const Column list[] = {
      {80, true, tables[0]}, {80, true, tables[1]}, {90, false, tables[2]}, {90, false, tables[3]}};
  return list;
}

// "cuda[:N][:sm80|:sm90][:f16]" taken apart.
struct Name {
  int ordinal = 0;
  std::string_view column;  // empty: the fastest
  bool f16 = false;
};

Result<Name> parse(std::string_view name) {
  Name parsed;
  std::string_view rest = name.substr(std::string_view("cuda").size());
  bool is_first = true;
  for (; !rest.empty(); is_first = false) {
    rest.remove_prefix(1);  // the colon
    const std::string_view part = rest.substr(0, rest.find(':'));
    rest.remove_prefix(part.size());
    const auto [end, error] =
        std::from_chars(part.data(), part.data() + part.size(), parsed.ordinal);
    const bool is_number = error == std::errc() && end == part.data() + part.size();
    if (is_number && parsed.ordinal >= 0 && is_first) continue;
    if ((part == "sm80" || part == "sm90") && parsed.column.empty() && !parsed.f16) {
      parsed.column = part;
    } else if (part == "f16" && !parsed.f16) {
      parsed.f16 = true;
    } else {
      return invalid_argument(
          fmt::format("no device \"{}\"; expected cuda[:number][:sm80|:sm90][:f16]", name));
    }
  }
  return parsed;
}

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  const Result<int> count = count_devices();
  for (int ordinal = 0; count.ok() && ordinal < *count; ++ordinal) {
    const Result<int> capability = capability_of(ordinal);
    for (const Column& column : columns()) {
      if (!capability.ok() || !column.runs_on(*capability)) continue;
      names.push_back(fmt::format("cuda:{}:{}", ordinal, column.table.name));
    }
  }
  return names;
}

Result<Backend> open(std::string_view name) {
  const Name wanted = INFLLM_TRY(parse(name));
  const std::shared_ptr<Device> device = INFLLM_TRY(open_device(wanted.ordinal));
  const Kernels* best = nullptr;
  for (const Column& column : columns()) {
    if (column.runs_on(device->capability) &&
        (column.table.activation == DType::kF16) == wanted.f16 &&
        (wanted.column.empty() || column.table.name.starts_with(wanted.column))) {
      best = &column.table;
    }
  }
  if (best == nullptr) {
    return unsupported(fmt::format(
        "no device \"{}\": cuda:{} has compute capability {}.{}, and sm90 is for 9.0; use "
        "\"cuda:{}\"",
        name, wanted.ordinal, device->capability / 10, device->capability % 10, wanted.ordinal));
  }
  return Backend{.name = fmt::format("cuda:{}:{}", wanted.ordinal, best->name),
                 .kernels = best,
                 .state = device};
}

}  // namespace infllm::cuda
