// SPDX-License-Identifier: Apache-2.0
//
// Measurements that last: one JSON object a line, with what is needed to judge it later.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "infllm/app/session.h"

namespace infllm::app {

// {"name": .., "backend": "cpu:avx2", "device": "<processor>", "commit": .., "date": "2026-11-22"}:
// the fields of bench/results/README.md that every record has.
nlohmann::json record_header(const Session& session, const std::string& name);

// Appends `records` to `path`; kIoError names the file. None of them: sees whether it could.
Status append_records(const std::string& path, const std::vector<nlohmann::json>& records);

struct Summary {
  double mean = 0;
  double deviation = 0;  // of the sample
  double median = 0;
  double low = 0;
  double high = 0;
};
Summary summarize(std::vector<double> values);

// "dense,sparse" as a list without doubles; kInvalidArgument for another word.
Result<std::vector<std::string>> parse_attention_list(const std::string& text);

}  // namespace infllm::app
