// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/memory.h"

#include <fmt/format.h>

#include "infllm/backend/cuda/device.h"

namespace infllm::cuda {
namespace {

double mebibytes(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

// Copies and allocations cannot be part of a graph: it would keep the host's pointer.
Status check_not_recording(const Device& device, std::string_view what) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  INFLLM_TRY(to_status(what, cudaStreamIsCapturing(device.stream, &capture)));
  if (capture == cudaStreamCaptureStatusNone) return {};
  return invalid_argument(
      fmt::format("{}: inside record(); allocate and copy before it, or after replay()", what));
}

cudaMemoryType type_of(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return cudaMemoryTypeUnregistered;
  }
  return attributes.type;
}

}  // namespace

Result<Buffer> allocate(const Backend& backend, std::size_t bytes) {
  const Device& device = device_of(backend);
  INFLLM_TRY(check_not_recording(device, "allocate"));
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes == 0 ? 1 : bytes);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    std::size_t free = 0;
    std::size_t total = 0;
    INFLLM_TRY(to_status("allocate", cudaMemGetInfo(&free, &total)));
    return resource_exhausted(
        fmt::format("{}: asked for {:.1f} MiB, but {:.1f} of {:.1f} MiB are free", backend.name,
                    mebibytes(bytes), mebibytes(free), mebibytes(total)));
  }
  INFLLM_TRY(to_status("allocate", error));
  const int ordinal = device.ordinal;
  return Buffer(std::shared_ptr<std::byte>(static_cast<std::byte*>(data),
                                           [ordinal](std::byte* memory) {
                                             cudaSetDevice(ordinal);
                                             cudaFree(memory);
                                           }),
                bytes);
}

Result<Buffer> allocate_visible(const Backend& backend, std::size_t bytes) {
  const Device& device = device_of(backend);
  INFLLM_TRY(check_not_recording(device, "allocate_visible"));
  // Mapped into the device's addresses under the same pointer, on every 64-bit system.
  void* data = nullptr;
  INFLLM_TRY(to_status("allocate_visible",
                       cudaHostAlloc(&data, bytes == 0 ? 1 : bytes, cudaHostAllocMapped)));
  const int ordinal = device.ordinal;
  return Buffer(std::shared_ptr<std::byte>(static_cast<std::byte*>(data),
                                           [ordinal](std::byte* memory) {
                                             cudaSetDevice(ordinal);
                                             cudaFreeHost(memory);
                                           }),
                bytes);
}

Status copy_in(const Backend& backend, void* to, const void* host, std::size_t bytes) {
  if (bytes == 0) return {};
  const Device& device = device_of(backend);
  INFLLM_TRY(check_not_recording(device, "copy_in"));
  const cudaMemoryType type = type_of(host);
  const cudaMemcpyKind kind =
      type == cudaMemoryTypeDevice ? cudaMemcpyDefault : cudaMemcpyHostToDevice;
  INFLLM_TRY(to_status("copy_in", cudaMemcpyAsync(to, host, bytes, kind, device.stream)));
  // Of pageable memory the call itself takes a copy before it returns. Page-locked memory is read
  // by the device when the copy's turn comes, after the call returned.
  return type == cudaMemoryTypeHost ? cuda::synchronize(backend) : Status();
}

Status copy_out(const Backend& backend, void* host, const void* from, std::size_t bytes) {
  const Device& device = device_of(backend);
  INFLLM_TRY(check_not_recording(device, "copy_out"));
  if (bytes > 0) {
    INFLLM_TRY(to_status(
        "copy_out", cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, device.stream)));
  }
  return cuda::synchronize(backend);
}

Status synchronize(const Backend& backend) {
  return to_status("cuda", cudaStreamSynchronize(device_of(backend).stream));
}

Result<Graph> record(const Backend& backend, const std::function<Status()>& body) {
  const Device& device = device_of(backend);
  INFLLM_TRY(check_not_recording(device, "record"));
  INFLLM_TRY(
      to_status("record", cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal)));
  const Status status = body();
  cudaGraph_t graph = nullptr;
  const cudaError_t error = cudaStreamEndCapture(device.stream, &graph);
  const std::shared_ptr<CUgraph_st> steps(graph, [](cudaGraph_t g) {
    if (g != nullptr) cudaGraphDestroy(g);
  });
  if (!status.ok()) {
    static_cast<void>(cudaGetLastError());
    return status;
  }
  INFLLM_TRY(to_status("record", error));

  cudaGraphExec_t ready = nullptr;
  INFLLM_TRY(to_status("record", cudaGraphInstantiate(&ready, graph, 0)));
  const int ordinal = device.ordinal;
  Graph recorded{std::shared_ptr<void>(ready, [ordinal](void* exec) {
    cudaSetDevice(ordinal);
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec));
  })};
  INFLLM_TRY(to_status("record", cudaGraphUpload(ready, device.stream)));
  return recorded;
}

Status replay(const Backend& backend, const Graph& graph) {
  const Device& device = device_of(backend);
  return to_status(
      "replay", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph.handle.get()), device.stream));
}

}  // namespace infllm::cuda
