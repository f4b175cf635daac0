// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/open.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "infllm/backend/cpu/host.h"
#include "infllm/backend/cuda/open.h"
#include "infllm/backend/reference/rounding.h"
#include "infllm/backend/reference/table.h"
#include "infllm/ops/kernels.h"

namespace infllm {
namespace {

Backend host_backend(std::string name, const Kernels& kernels, const OpenOptions& options) {
  return {.name = std::move(name),
          .kernels = &kernels,
          .pool = std::make_shared<ThreadPool>(options.threads)};
}

const cpu::Column& best_cpu() {
  const cpu::Column* best = nullptr;
  for (const cpu::Column& column : cpu::columns()) {
    if (column.supported()) best = &column;
  }
  return *best;
}

}  // namespace

std::vector<std::string> available_backends() {
  std::vector<std::string> names = {"reference"};
  for (const cpu::Column& column : cpu::columns()) {
    if (column.supported()) names.push_back(fmt::format("cpu:{}", column.name));
  }
  for (std::string& name : cuda::available()) names.push_back(std::move(name));
  return names;
}

Result<Backend> open_backend(std::string_view name, const OpenOptions& options) {
  if (name == "cuda" || name.starts_with("cuda:")) return cuda::open(name);
  if (name == "auto" && !cuda::available().empty()) return cuda::open("cuda");
  if (name == "reference") return host_backend("reference", reference::kernels(), options);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (name == fmt::format("reference:{}", name_of(dtype))) {
      Backend backend = host_backend(std::string(name), reference::kernels(), options);
      backend.state = std::make_shared<reference::Rounding>(
          reference::Rounding{.operand = dtype, .output = dtype});
      return backend;
    }
  }
  const std::string wanted =
      name == "auto" || name == "cpu" ? fmt::format("cpu:{}", best_cpu().name) : std::string(name);
  for (const cpu::Column& column : cpu::columns()) {
    if (wanted == fmt::format("cpu:{}", column.name) && column.supported()) {
      return host_backend(wanted, column.kernels(), options);
    }
  }
  return unsupported(fmt::format("no device \"{}\" here; choose one of: auto, cpu, {}", name,
                                 fmt::join(available_backends(), ", ")));
}

}  // namespace infllm
