// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/record.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "infllm/app/report.h"

namespace infllm::app {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// $INFLLM_COMMIT, for a copy of the tree without its repository; else the commit that the current
// directory's repository is at; empty outside of one.
std::string commit() {
  if (const char* named = std::getenv("INFLLM_COMMIT"); named != nullptr) return named;
  std::error_code error;
  for (fs::path at = fs::current_path(error); !at.empty(); at = at.parent_path()) {
    const fs::path git = at / ".git";
    if (fs::is_directory(git, error)) {
      const std::string head = first_line(git / "HEAD");
      if (!head.starts_with("ref: ")) return head.substr(0, 12);
      const std::string ref = head.substr(5);
      if (const std::string id = first_line(git / ref); !id.empty()) return id.substr(0, 12);
      std::ifstream packed(git / "packed-refs");
      for (std::string line; std::getline(packed, line);) {
        if (line.ends_with(" " + ref)) return line.substr(0, 12);
      }
      return "";
    }
    if (at == at.parent_path()) break;
  }
  return "";
}

std::string processor() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown processor";
}

// "580.159.04": the first word with dots of the kernel module's line; empty where there is none.
std::string driver() {
  std::istringstream words(first_line("/proc/driver/nvidia/version"));
  for (std::string word; words >> word;) {
    const bool is_version = word.find_first_not_of("0123456789.") == std::string::npos;
    if (is_version && std::ranges::count(word, '.') > 0) return word;
  }
  return "";
}

}  // namespace

nlohmann::json record_header(const Session& session, const std::string& name) {
  const Result<DeviceInfo> info = device_info(session.backend);
  nlohmann::json header = {
      {"name", name},
      {"backend", session.backend.name},
      {"device", info.ok() && !info->name.empty() ? info->name : processor()},
      {"commit", commit()},
      {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))},
  };
  if (const std::string version = driver(); session.is_device() && !version.empty()) {
    header["driver"] = version;
  }
  return header;
}

Status append_records(const std::string& path, const std::vector<nlohmann::json>& records) {
  std::ofstream file(path, std::ios::app);
  for (const nlohmann::json& record : records) file << dump(record) << '\n';
  file.flush();
  if (!file) return io_error(fmt::format("{}: cannot be written", path));
  return {};
}

Summary summarize(std::vector<double> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  const auto count = static_cast<double>(values.size());
  Summary summary;
  summary.mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
  double squares = 0;
  for (const double value : values) squares += (value - summary.mean) * (value - summary.mean);
  summary.deviation = values.size() > 1 ? std::sqrt(squares / (count - 1)) : 0;
  const std::size_t middle = values.size() / 2;
  summary.median =
      values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
  summary.low = values.front();
  summary.high = values.back();
  return summary;
}

Result<std::vector<std::string>> parse_attention_list(const std::string& text) {
  std::vector<std::string> modes;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    if (word != "dense" && word != "sparse") {
      return invalid_argument(
          fmt::format("--attention {}: \"{}\" is neither dense nor sparse", text, word));
    }
    if (std::ranges::count(modes, word) == 0) modes.push_back(word);
  }
  if (modes.empty()) return invalid_argument("--attention: name dense, sparse or both");
  return modes;
}

}  // namespace infllm::app
