// SPDX-License-Identifier: Apache-2.0
//
// What a decode step's matrix products reach on the shapes of an 8B model: sm90/stream.cu beside
// cuBLASLt, in microseconds and as a share of the memory's rate, and then a whole layer's products
// with the norms between them. Weights rotate through more memory than the L2 cache holds, as
// layers do; launches follow each other in a graph, as in a decode step.
//
//   linear_probe [terabytes per second that count as 100%]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/rows.h"
#include "infllm/backend/cuda/sm90/linear.h"

namespace infllm::cuda {
namespace {

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}
void must(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message().c_str());
  std::exit(2);
}

__global__ void fill(__nv_bfloat16* x, std::int64_t count, float scale) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    auto h = static_cast<unsigned>(i * 2654435761u + 12345);
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    x[i] = __float2bfloat16(scale * (static_cast<float>(h & 0xffff) / 32768.0f - 1));
  }
}

__nv_bfloat16* random_numbers(std::int64_t count, float scale) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, static_cast<std::size_t>(count) * 2));
  fill<<<1024, 256>>>(static_cast<__nv_bfloat16*>(memory), count, scale);
  must(cudaDeviceSynchronize());
  return static_cast<__nv_bfloat16*>(memory);
}

// Microseconds of one of `copies` products.
double time(const Device& device, int copies, const std::function<Status(int)>& product) {
  must(product(0));
  must(cudaStreamSynchronize(device.stream));
  must(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < copies; ++i) must(product(i));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t steps = nullptr;
  must(cudaStreamEndCapture(device.stream, &graph));
  must(cudaGraphInstantiate(&steps, graph, 0));
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    must(cudaEventRecord(begin, device.stream));
    must(cudaGraphLaunch(steps, device.stream));
    must(cudaEventRecord(end, device.stream));
    must(cudaEventSynchronize(end));
    times.push_back(0);
    must(cudaEventElapsedTime(&times.back(), begin, end));
  }
  std::sort(times.begin(), times.end());
  must(cudaGraphExecDestroy(steps));
  must(cudaGraphDestroy(graph));
  return 1000.0 * times[times.size() / 2] / copies;
}

const Kernels& table() {
  static const Kernels kernels{.activation = DType::kBF16};
  return kernels;
}

LinearWeight view(__nv_bfloat16* data, std::int64_t outputs, std::int64_t inputs) {
  const auto bytes = static_cast<std::size_t>(outputs * inputs * 2);
  const std::shared_ptr<std::byte> memory(reinterpret_cast<std::byte*>(data), [](std::byte*) {});
  return {.storage = Buffer(memory, bytes),
          .outputs = outputs,
          .inputs = inputs,
          .format = WeightFormat::kBF16};
}

void probe(const Backend& backend, const char* name, std::int64_t outputs, std::int64_t inputs,
           double peak) {
  const Device& device = device_of(backend);
  const std::int64_t bytes = outputs * inputs * 2;
  const int copies = static_cast<int>(std::clamp<std::int64_t>((1 << 30) / bytes, 2, 32));
  __nv_bfloat16* memory = random_numbers(outputs * inputs * copies, 0.02f);
  __nv_bfloat16* x = random_numbers(inputs, 1);
  __nv_bfloat16* y = random_numbers(2 * outputs, 1);
  std::byte* workspace = nullptr;
  must(cudaMalloc(&workspace, kBlasWorkspaceBytes));
  std::vector<LinearWeight> weights;
  for (int i = 0; i < copies; ++i) {
    weights.push_back(view(memory + i * outputs * inputs, outputs, inputs));
  }
  const double own = time(device, copies, [&](int i) {
    return sm90::linear(backend, {.weight = &weights[i], .tokens = 1, .x = x, .y = y}, {});
  });
  const double blas = time(device, copies, [&](int i) {
    return device.blas->multiply(device, {.tokens = 1,
                                          .outputs = outputs,
                                          .inputs = inputs,
                                          .x = x,
                                          .weight = weights[i].storage.data(),
                                          .weight_stride = inputs,
                                          .y = y + outputs,
                                          .workspace = {workspace, kBlasWorkspaceBytes}});
  });
  must(sm90::linear(backend, {.weight = &weights[copies - 1], .tokens = 1, .x = x, .y = y}, {}));
  std::vector<__nv_bfloat16> both(static_cast<std::size_t>(2 * outputs));
  must(cudaStreamSynchronize(device.stream));
  must(cudaMemcpy(both.data(), y, both.size() * 2, cudaMemcpyDeviceToHost));
  double worst = 0;
  for (std::int64_t i = 0; i < outputs; ++i) {
    worst = std::max<double>(
        worst, std::fabs(__bfloat162float(both[i]) - __bfloat162float(both[outputs + i])));
  }
  const auto share = [&](double us) { return static_cast<double>(bytes) / us / 1e6 / peak * 100; };
  std::printf("%-8s %6ld x %5ld: ours %7.2f us %5.1f%%   cuBLASLt %7.2f us %5.1f%%   apart %.2g\n",
              name, outputs, inputs, own, share(own), blas, share(blas), worst);
  for (void* array : {static_cast<void*>(memory), static_cast<void*>(x), static_cast<void*>(y),
                      static_cast<void*>(workspace)}) {
    must(cudaFree(array));
  }
}

// All products of `layers` layers with the norms and the SwiGLU between them: what overlap gains.
void probe_layers(const Backend& backend, int layers, double peak) {
  constexpr std::int64_t kHidden = 4096, kWide = 16384, kQkv = 4608;
  struct Shape {
    std::int64_t outputs, inputs;
  };
  constexpr Shape kShapes[] = {
      {kQkv, kHidden}, {kHidden, kHidden}, {2 * kWide, kHidden}, {kHidden, kWide}};
  std::vector<LinearWeight> weights;
  std::int64_t bytes = 0;
  for (int i = 0; i < layers; ++i) {
    for (const Shape& s : kShapes) {
      weights.push_back(view(random_numbers(s.outputs * s.inputs, 0.02f), s.outputs, s.inputs));
      bytes += weights.back().bytes();
    }
  }
  __nv_bfloat16* hidden = random_numbers(kHidden, 1);
  __nv_bfloat16* normed = random_numbers(kHidden, 1);
  __nv_bfloat16* wide = random_numbers(2 * kWide, 1);
  __nv_bfloat16* gated = random_numbers(kWide, 1);
  float* norm = nullptr;
  must(cudaMalloc(&norm, kHidden * sizeof(float)));
  must(cudaMemset(norm, 0x3f, kHidden * sizeof(float)));  // about 0.75
  const auto layer = [&](int i) -> Status {
    const LinearWeight* w = &weights[4 * static_cast<std::size_t>(i)];
    const auto multiply = [&](const LinearWeight& weight, const void* x, void* y, bool add) {
      return sm90::linear(backend,
                          {.weight = &weight, .tokens = 1, .x = x, .y = y, .accumulate = add}, {});
    };
    const RmsNormParams normalise{
        .tokens = 1, .width = kHidden, .x = hidden, .weight = norm, .epsilon = 1e-5f, .y = normed};
    INFLLM_TRY(rms_norm(backend, normalise, {}));
    INFLLM_TRY(multiply(w[0], normed, wide, false));
    INFLLM_TRY(multiply(w[1], wide, hidden, true));
    INFLLM_TRY(rms_norm(backend, normalise, {}));
    INFLLM_TRY(multiply(w[2], normed, wide, false));
    INFLLM_TRY(swiglu(backend, {.tokens = 1, .width = kWide, .x = wide, .y = gated}, {}));
    return multiply(w[3], gated, hidden, true);
  };
  const double us = time(device_of(backend), layers, layer);
  const double share = static_cast<double>(bytes) / layers / us / 1e6 / peak * 100;
  std::printf("a layer's four products, two norms and SwiGLU: %.2f us %.1f%%\n", us, share);
}

}  // namespace
}  // namespace infllm::cuda

int main(int argc, char** argv) {
  using namespace infllm::cuda;
  const double peak = argc > 1 ? std::atof(argv[1]) : 4.2;
  const auto device = open_device(0);
  must(device.status());
  const infllm::Backend backend{.name = "cuda:0", .kernels = &table(), .state = *device};
  probe(backend, "qkv", 4608, 4096, peak);
  probe(backend, "o", 4096, 4096, peak);
  probe(backend, "gate_up", 32768, 4096, peak);
  probe(backend, "down", 4096, 16384, peak);
  probe(backend, "head", 73448, 4096, peak);
  probe(backend, "small", 2048, 1024, peak);
  probe_layers(backend, 6, peak);
  return 0;
}
