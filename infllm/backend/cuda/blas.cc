// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/blas.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "infllm/backend/cuda/device.h"

namespace infllm::cuda {
namespace {

// Where the library may be: what the user says, the loader's own places, the toolkit's.
std::vector<std::string> candidates() {
  std::vector<std::string> folders = {"", "/usr/local/cuda/lib64/"};
  std::vector<std::string> paths;
  if (const char* wish = std::getenv("INFLLM_CUBLASLT"); wish != nullptr && *wish != '\0') {
    paths.emplace_back(wish);
    folders = {std::string(wish) + "/"};
  }
  for (const std::string& folder : folders) {
    for (const int major : {13, 12}) {
      paths.push_back(fmt::format("{}libcublasLt.so.{}", folder, major));
    }
  }
  return paths;
}

std::uint32_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  return static_cast<std::uint32_t>(std::min<std::uintptr_t>(address & -address, 256));
}

}  // namespace

// The functions by their names in the library.
struct Blas::Library {
  ~Library() {
    if (handle != nullptr) destroy(handle);
  }

  template <typename Function>
  bool find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(object, name));
    return function != nullptr;
  }
  bool find_all() {
    return find(create, "cublasLtCreate") && find(destroy, "cublasLtDestroy") &&
           find(matmul, "cublasLtMatmul") && find(heuristic, "cublasLtMatmulAlgoGetHeuristic") &&
           find(create_desc, "cublasLtMatmulDescCreate") &&
           find(destroy_desc, "cublasLtMatmulDescDestroy") &&
           find(set_desc, "cublasLtMatmulDescSetAttribute") &&
           find(create_layout, "cublasLtMatrixLayoutCreate") &&
           find(destroy_layout, "cublasLtMatrixLayoutDestroy") &&
           find(create_preference, "cublasLtMatmulPreferenceCreate") &&
           find(destroy_preference, "cublasLtMatmulPreferenceDestroy") &&
           find(set_preference, "cublasLtMatmulPreferenceSetAttribute") &&
           find(describe, "cublasLtGetStatusString");
  }
  Status check(cublasStatus_t status) const {
    if (status == CUBLAS_STATUS_SUCCESS) return {};
    const std::string message = fmt::format("linear: cuBLASLt says \"{}\"", describe(status));
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? unsupported(message) : io_error(message);
  }

  void* object = nullptr;  // stays loaded: its kernels may run until the process ends
  cublasLtHandle_t handle = nullptr;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_desc = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_desc = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_desc = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtGetStatusString) describe = nullptr;
};

struct Blas::Plan {
  explicit Plan(const Library& l) : library(l) {}
  ~Plan() {
    if (desc != nullptr) library.destroy_desc(desc);
    for (const cublasLtMatrixLayout_t layout : {weight, x, y}) {
      if (layout != nullptr) library.destroy_layout(layout);
    }
    if (preference != nullptr) library.destroy_preference(preference);
  }

  const Library& library;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t weight = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t y = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t found{};
};

Blas::Blas() = default;
Blas::~Blas() { plans_.clear(); }  // they need the library

Status Blas::load() {
  const std::lock_guard lock(mutex_);
  if (tried_) return status_;
  tried_ = true;
  library_ = std::make_unique<Library>();
  std::string first_error;
  for (const std::string& path : candidates()) {
    library_->object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_->object != nullptr) break;
    if (first_error.empty()) first_error = dlerror();
  }
  if (library_->object == nullptr) {
    return status_ = unsupported(fmt::format(
               "cuda: cuBLASLt is missing ({}); looked for {}. Install the CUDA toolkit or `pip "
               "install nvidia-cublas`, and point INFLLM_CUBLASLT at the folder of the library",
               first_error, fmt::join(candidates(), ", ")));
  }
  if (!library_->find_all()) {
    return status_ = unsupported("cuda: cuBLASLt lacks functions; expected version 12 or 13");
  }
  return status_ = library_->check(library_->create(&library_->handle));
}

Result<const Blas::Plan*> Blas::plan_of(const Product& p) {
  const std::lock_guard lock(mutex_);
  const std::uint32_t alignment =
      std::min({alignment_of(p.x), alignment_of(p.weight), alignment_of(p.y)});
  const Shape shape{p.dtype,
                    p.tokens,
                    p.outputs,
                    p.inputs,
                    p.weight_stride,
                    p.beta != 0,
                    static_cast<int>(alignment) + (p.workspace.empty() ? 0 : 1024)};
  if (const auto known = plans_.find(shape); known != plans_.end()) return known->second.get();

  // cuBLASLt counts columns first: its Y^T (outputs x T) is our row-major y.
  const Library& l = *library_;
  auto plan = std::make_unique<Plan>(l);
  const cudaDataType_t type = p.dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  INFLLM_TRY(l.check(l.create_desc(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
  INFLLM_TRY(l.check(
      l.set_desc(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed))));
  const auto layout = [&](cublasLtMatrixLayout_t& matrix, std::int64_t rows, std::int64_t columns,
                          std::int64_t stride) {
    return l.check(l.create_layout(&matrix, type, static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(columns), stride));
  };
  INFLLM_TRY(layout(plan->weight, p.inputs, p.outputs, p.weight_stride));
  INFLLM_TRY(layout(plan->x, p.inputs, p.tokens, p.inputs));
  INFLLM_TRY(layout(plan->y, p.outputs, p.tokens, p.outputs));
  INFLLM_TRY(l.check(l.create_preference(&plan->preference)));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return l.check(l.set_preference(plan->preference, attribute, &value, sizeof(value)));
  };
  INFLLM_TRY(prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    std::uint64_t{p.workspace.empty() ? 0 : kBlasWorkspaceBytes}));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    INFLLM_TRY(prefer(attribute, alignment));
  }
  int count = 0;
  INFLLM_TRY(l.check(l.heuristic(l.handle, plan->desc, plan->weight, plan->x, plan->y, plan->y,
                                 plan->preference, 1, &plan->found, &count)));
  if (count == 0) {
    return unsupported(fmt::format("linear: cuBLASLt has no algorithm for {} x {} x {}", p.tokens,
                                   p.outputs, p.inputs));
  }
  return (plans_[shape] = std::move(plan)).get();
}

Status Blas::multiply(const Device& device, const Product& p) {
  INFLLM_TRY(load());
  const Plan& plan = *INFLLM_TRY(plan_of(p));
  return library_->check(library_->matmul(library_->handle, plan.desc, &p.alpha, p.weight,
                                          plan.weight, p.x, plan.x, &p.beta, p.y, plan.y, p.y,
                                          plan.y, &plan.found.algo, p.workspace.data(),
                                          p.workspace.size(), device.stream));
}

}  // namespace infllm::cuda
