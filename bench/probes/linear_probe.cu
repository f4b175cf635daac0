// SPDX-License-Identifier: Apache-2.0
//
// What a decode step's matrix products reach: gemv.cu beside cuBLASLt on the shapes of an 8B model,
// in microseconds and as a share of the memory's rate. Weights rotate through more memory than the
// L2 cache holds, as layers do; launches follow each other in a graph, as in a decode step.
//
//   linear_probe [terabytes per second that count as 100%]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/gemv.h"

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

void probe(const Device& device, const char* name, std::int64_t outputs, std::int64_t inputs,
           std::int64_t tokens, double peak) {
  const std::int64_t bytes = outputs * inputs * 2;
  const int copies = static_cast<int>(std::clamp<std::int64_t>((1 << 30) / bytes, 2, 32));
  __nv_bfloat16* weights = random_numbers(outputs * inputs * copies, 0.02f);
  __nv_bfloat16* x = random_numbers(tokens * inputs, 1);
  __nv_bfloat16* y = random_numbers(tokens * outputs, 1);
  std::byte* workspace = nullptr;
  must(cudaMalloc(&workspace, kBlasWorkspaceBytes));
  Product p{.tokens = tokens,
            .outputs = outputs,
            .inputs = inputs,
            .x = x,
            .weight_stride = inputs,
            .y = y,
            .workspace = {workspace, kBlasWorkspaceBytes}};
  const auto with = [&](int i) {
    p.weight = weights + i * outputs * inputs;
    return p;
  };
  const double own = time(device, copies, [&](int i) { return gemv(device, with(i)); });
  const double blas =
      time(device, copies, [&](int i) { return device.blas->multiply(device, with(i)); });
  const auto share = [&](double us) { return static_cast<double>(bytes) / us / 1e6 / peak * 100; };
  std::printf("%-8s %6ld x %5ld tokens %ld: gemv %7.2f us %5.1f%%   cuBLASLt %7.2f us %5.1f%%\n",
              name, outputs, inputs, tokens, own, share(own), blas, share(blas));
  for (void* memory : {static_cast<void*>(weights), static_cast<void*>(x), static_cast<void*>(y),
                       static_cast<void*>(workspace)}) {
    must(cudaFree(memory));
  }
}

}  // namespace
}  // namespace infllm::cuda

int main(int argc, char** argv) {
  using namespace infllm::cuda;
  const double peak = argc > 1 ? std::atof(argv[1]) : 4.2;
  const auto device = open_device(0);
  must(device.status());
  for (const std::int64_t tokens : {1, 2, 4}) {
    probe(**device, "qkv", 4608, 4096, tokens, peak);
    probe(**device, "o", 4096, 4096, tokens, peak);
    probe(**device, "gate_up", 32768, 4096, tokens, peak);
    probe(**device, "down", 4096, 16384, tokens, peak);
    probe(**device, "head", 73448, 4096, tokens, peak);
  }
  return 0;
}
