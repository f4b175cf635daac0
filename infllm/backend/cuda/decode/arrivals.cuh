// SPDX-License-Identifier: Apache-2.0
//
// How a thread block finds out which part of which row is its own when a launch need not be
// resident as a whole: it takes the next number, and meanwhile what it needs to know of the row
// that it will nearly always be comes into L1.
#pragma once

#include "infllm/backend/cuda/decode/exchange.cuh"

namespace infllm::cuda::decode {

// What is known of a sequence, and its page table as far as one load a thread goes, into L1, all at
// once. The loads have no conditions; their results go where nobody looks, as loads whose results
// nobody takes are not made.
class WarmSequence {
 public:
  __device__ __forceinline__ WarmSequence(const Batch& batch, int sequence) {
    constexpr int kSector = 8;
    const int thread = static_cast<int>(threadIdx.x);
    load(batch.page_table + std::int64_t{sequence} * batch.max_pages +
             min(kSector * thread, batch.max_pages - 1),
         words_[0]);
    const void* from = batch.kv_length + sequence;
    if (thread == 0) from = batch.query_start + sequence;
    if (thread == 1) from = batch.query_start + sequence + 1;
    if (thread == 2 && batch.any_sparse) from = batch.sparse + sequence;
    load(from, words_[1]);
  }

  // anywhere: a word for each thread.
  __device__ __forceinline__ void wait(std::int32_t* anywhere) const {
    anywhere[threadIdx.x] = static_cast<std::int32_t>(words_[0] ^ words_[1]);
  }

 private:
  __device__ __forceinline__ static void load(const void* from, std::uint32_t& word) {
    asm volatile("ld.global.ca.u8 %0, [%1];" : "=r"(word) : "l"(from));
  }

  std::uint32_t words_[2];
};

// Which of `count` thread blocks this is, in the order in which they start; by all threads.
// arrivals: how many have started, less one, and kNothing when all have; number: in shared memory.
//
// A row's parts have numbers that follow each other. So, whatever else is on the device, all parts
// of all rows but one have started, and run to their end; nobody needs the whole launch to be
// resident.
__device__ __forceinline__ int take_number(std::uint32_t* arrivals, int count, int& number) {
  if (threadIdx.x == 0) {
    number = static_cast<int>(atomicAdd(arrivals, 1u) + 1);   // from kNothing on
    if (number == count - 1) atomicExch(arrivals, kNothing);  // before anybody starts the next one
  }
  __syncthreads();
  return number;
}

}  // namespace infllm::cuda::decode
