// SPDX-License-Identifier: Apache-2.0
//
// y = alpha x W^T + beta y for one token. The rows of W are shared out evenly among two thread
// blocks a multiprocessor. In each, one thread keeps a ring of stages, a row or a few, 8 KB, filled
// with bulk copies; 256 threads hold x in registers, eight columns in kVectors places each, and
// turn a row at a time into 256 partial sums. Those of eight rows are folded over the lanes of a
// warp together: 9 exchanges where eight single rows would take 40. What the warps have left over
// is added up once, at the end.
//
// The kernel behind is let in when the last copy has been asked for: its own first copies then
// arrive while this one's last rows are multiplied, and memory rests less. Measured for the
// products, norms and SwiGLU of a layer of 8B (bench/probes/linear_probe.cu), microseconds on an
// H200:
//
//   123.8  two blocks of 110 KB, kernel behind let in late          (91% of 4.2 TB/s)
//   127.1  the same, stages of W dealt out to the blocks in turn (another run: 125.5)
//   130.6  the same, the widest product through cuBLASLt
//   128.3  three blocks of 72 KB, stages in turn; four or eight blocks, of which two fit: 135, 153
//   138.2  one block of 110 KB, let in late; let in at the start: 137.7
#include <algorithm>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm90/linear.h"
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/ops/kernels.h"

namespace infllm::cuda::sm90 {
namespace {

using namespace tile;

constexpr int kWarps = 8;  // that compute; one more loads
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kColumns = kConsumers * kVector;  // of one pass over a row
constexpr int kMaxVectors = 8;
constexpr int kFolded = 8;  // rows that are folded together
constexpr int kStageBytes = 8192;
constexpr int kMaxStages = 16;
constexpr int kBlocksPerProcessor = 2;
constexpr int kSharedBytes = 110 << 10;  // of a block
constexpr int kMaxPartialBytes = 46 << 10;

struct Stream {
  const std::byte* weight;
  const void* x;
  void* y;
  float alpha;
  float beta;
  int outputs;
  int units;       // of 16 bytes in a row
  int row_bytes;   // of W
  int stage_rows;  // rows of a stage
  int stages;      // of the ring
};

// The rows of W of one block.
struct Share {
  __device__ explicit Share(const Stream& s) {
    const auto begin = [&](std::int64_t block) {
      return static_cast<int>(block * s.outputs / gridDim.x);
    };
    first = begin(blockIdx.x);
    rows = begin(std::int64_t{blockIdx.x} + 1) - first;
  }
  int first;
  int rows;
};

// Where things are in dynamic shared memory, after the ring.
struct Shared {
  __device__ Shared(std::byte* base, const Stream& s)
      : ring(base),
        full(reinterpret_cast<std::uint64_t*>(base + s.stages * s.stage_rows * s.row_bytes)),
        empty(full + kMaxStages),
        partial(reinterpret_cast<float*>(empty + kMaxStages)) {}

  std::byte* ring;
  std::uint64_t* full;
  std::uint64_t* empty;
  float* partial;  // [rows][kWarps]
};

// The place of the next stage in the ring.
struct Cursor {
  int slot = 0;
  std::uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

__device__ void load_rows(const Stream& s, const Shared& shared, const Share& share) {
  Cursor cursor;
  for (int row = 0; row < share.rows; row += s.stage_rows) {
    // The first round finds every stage empty: a barrier that nobody arrived at has "finished" the
    // phase before its first.
    mbarrier_wait(&shared.empty[cursor.slot], cursor.parity ^ 1);
    const auto bytes =
        static_cast<std::uint32_t>(min(s.stage_rows, share.rows - row)) * s.row_bytes;
    mbarrier_arrive_expect_tx(&shared.full[cursor.slot], bytes);
    tma_load_1d(&shared.full[cursor.slot], shared.ring + cursor.slot * s.stage_rows * s.row_bytes,
                s.weight + std::int64_t{share.first + row} * s.row_bytes, bytes);
    cursor.advance(s.stages);
  }
}

// Adds kFolded numbers of each lane up over the warp. Lanes 4 r .. 4 r + 3 have the sum of number r
// afterwards.
__device__ float fold(float (&sums)[kFolded], int lane) {
  int bit = 16;
#pragma unroll
  for (int half = kFolded / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? sums[i + half] : sums[i];
      const float given = upper ? sums[i] : sums[i + half];
      sums[i] = kept + __shfl_xor_sync(0xffffffff, given, bit);
    }
  }
  sums[0] += __shfl_xor_sync(0xffffffff, sums[0], 2);
  return sums[0] + __shfl_xor_sync(0xffffffff, sums[0], 1);
}

template <typename T, int kVectors>
__device__ void multiply_rows(const Stream& s, const Shared& shared, int rows) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  float x[kVectors][kVector] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int unit = v * kConsumers + thread;
    if (unit < s.units) load(static_cast<const T*>(s.x) + unit * kVector, x[v]);
  }
  Cursor cursor;
  int row_in_stage = 0;
  for (int first = 0; first < rows; first += kFolded) {
    float sums[kFolded] = {};
#pragma unroll
    for (int i = 0; i < kFolded; ++i) {
      const int row = first + i;
      if (row >= rows) break;
      if (row_in_stage == 0) mbarrier_wait(&shared.full[cursor.slot], cursor.parity);
      const auto* weights = reinterpret_cast<const T*>(
          shared.ring + (cursor.slot * s.stage_rows + row_in_stage) * s.row_bytes);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int unit = v * kConsumers + thread;
        if (unit >= s.units) break;
        float w[kVector];
        load(weights + unit * kVector, w);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sums[i] = fmaf(w[k], x[v][k], sums[i]);
      }
      if (++row_in_stage == s.stage_rows || row == rows - 1) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.empty[cursor.slot]);
        cursor.advance(s.stages);
        row_in_stage = 0;
      }
    }
    const float sum = fold(sums, lane);
    if (lane % 4 == 0 && first + lane / 4 < rows) {
      shared.partial[(first + lane / 4) * kWarps + thread / 32] = sum;
    }
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads) stream_kernel(Stream s) {
  extern __shared__ __align__(128) std::byte memory[];
  const Shared shared(memory, s);
  const Share share(s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.stages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      load_rows(s, shared, share);
      start_next();
    }
    wait_for_previous();
  } else {
    wait_for_previous();
    multiply_rows<T, kVectors>(s, shared, share.rows);
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x); row < share.rows; row += kThreads) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.partial[row * kWarps + warp];
    T* out = static_cast<T*>(s.y) + share.first + row;
    *out = to<T>(s.beta != 0 ? s.alpha * sum + s.beta * to_float(*out) : s.alpha * sum);
  }
}

// The launch of kVectors = ceil(inputs / kColumns).
template <typename T, int kVectors = 1>
Status launch_stream(const Device& device, const Stream& s, std::size_t shared_bytes) {
  if constexpr (kVectors < kMaxVectors) {
    if (s.units > kVectors * kConsumers) {
      return launch_stream<T, kVectors + 1>(device, s, shared_bytes);
    }
  }
  const auto kernel = stream_kernel<T, kVectors>;
  INFLLM_TRY(to_status(
      "linear",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
  return launch(device, "linear", kernel,
                static_cast<unsigned>(kBlocksPerProcessor * device.sm_count), kThreads,
                shared_bytes, s);
}

}  // namespace

bool multiplies(const LinearParams& p) {
  constexpr std::int64_t kFewestBlocks = kBlocksPerProcessor * 64;  // of any Hopper device
  constexpr std::int64_t kMostRows = kMaxPartialBytes / (kWarps * sizeof(float));
  return p.tokens == 1 && p.weight->inputs % kVector == 0 &&
         p.weight->inputs <= kMaxVectors * kColumns &&
         p.weight->outputs / kFewestBlocks < kMostRows;
}

Status linear(const Backend& backend, const LinearParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  Stream s{.weight = p.weight->storage.data(),
           .x = p.x,
           .y = p.y,
           .alpha = p.alpha,
           .beta = p.accumulate ? 1.0f : 0.0f,
           .outputs = static_cast<int>(p.weight->outputs),
           .units = static_cast<int>(p.weight->inputs / kVector),
           .row_bytes = static_cast<int>(p.weight->inputs * 2)};
  s.stage_rows = std::max(1, kStageBytes / s.row_bytes);
  const int stage_bytes = s.stage_rows * s.row_bytes;
  const int max_rows = s.outputs / (kBlocksPerProcessor * device.sm_count) + 1;
  const int others = max_rows * kWarps * static_cast<int>(sizeof(float)) +
                     2 * kMaxStages * static_cast<int>(sizeof(std::uint64_t));
  s.stages = std::min(kMaxStages, (kSharedBytes - others) / stage_bytes);
  const auto shared_bytes = static_cast<std::size_t>(s.stages * stage_bytes + others);
  return with_type(backend.kernels->activation,
                   [&]<typename T>(T) { return launch_stream<T>(device, s, shared_bytes); });
}

}  // namespace infllm::cuda::sm90
