// SPDX-License-Identifier: Apache-2.0
//
// Matrix products through cuBLASLt. The library is NVIDIA's, half a gigabyte, and not linked: it is
// loaded when the first weight is packed, from where the system's loader finds it, from the CUDA
// toolkit, or from $INFLLM_CUBLASLT (a folder or the file itself).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <tuple>

#include "infllm/core/dtype.h"
#include "infllm/core/status.h"

namespace infllm::cuda {

struct Device;

// y[T, outputs] = alpha x[T, inputs] W^T + beta y, all row-major and of one 16-bit type; sums in
// float32. `workspace` is of kBlasWorkspaceBytes, or empty.
struct Product {
  DType dtype = DType::kBF16;
  std::int64_t tokens = 0;
  std::int64_t outputs = 0;
  std::int64_t inputs = 0;
  const void* x = nullptr;
  const void* weight = nullptr;
  std::int64_t weight_stride = 0;  // elements between rows of W
  void* y = nullptr;
  float alpha = 1;
  float beta = 0;
  std::span<std::byte> workspace;
};

inline constexpr std::size_t kBlasWorkspaceBytes = std::size_t{32} << 20;
inline constexpr std::size_t kBlasWorkspaceAlignment = 256;  // cuBLASLt refuses others

class Blas {
 public:
  Blas();
  ~Blas();

  // Once; later calls give the first one's answer.
  Status load();
  // Nothing but a launch on the device's stream, once a shape has been seen. kUnsupported when the
  // library has no algorithm for the shape.
  Status multiply(const Device& device, const Product& product);

 private:
  struct Library;
  struct Plan;  // descriptors and the algorithm for one shape
  using Shape =
      std::tuple<DType, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, int>;
  Result<const Plan*> plan_of(const Product& product);

  std::mutex mutex_;
  bool tried_ = false;
  Status status_;
  std::unique_ptr<Library> library_;
  std::map<Shape, std::unique_ptr<Plan>> plans_;
};

}  // namespace infllm::cuda
