// SPDX-License-Identifier: Apache-2.0
//
// A tile of rows of D 16-bit elements in shared memory: row after row, the 16-byte pieces of a row
// permuted with the row number, so that eight rows' pieces of one column, which is what ldmatrix
// reads at a time, lie in different banks.
//
// Fragments of mma_m16n8k16 for one lane, of the 16 x 16 elements at (row, 16 column), row a
// multiple of 8:
//   a_fragment    as A
//   bt_fragments  transposed as B of two products, r[0..1] of rows 0 to 7, r[2..3] of rows 8 to 15:
//                 keys in Q K^T
//   b_fragments   as B of two products, r[0..1] of columns 0 to 7, r[2..3] of columns 8 to 15:
//                 values in P V
#pragma once

#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::sm80 {

template <int D>
struct SmemTile {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kPieces = D / 8;  // of 16 bytes in a row

  static __device__ __forceinline__ int offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row & 7)) << 4);
  }

  // Starts copies of kRows rows by kThreads threads; rows from `rows` on become zeros and are not
  // read.
  template <int kRows, int kThreads>
  static __device__ __forceinline__ void load(std::byte* to, const std::byte* from, int rows) {
    constexpr int kStep = kThreads / kPieces;  // a power of two: row + i has the bits of both
    static_assert((kStep & (kStep - 1)) == 0 && kRows % kStep == 0);
    const int row = static_cast<int>(threadIdx.x / kPieces);
    const int piece = static_cast<int>(threadIdx.x % kPieces);
    const int place = (piece ^ (row & 7)) << 4;
    to += row * kRowBytes;
    from += row * kRowBytes + piece * 16;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      tile::cp_async_16(to + i * kRowBytes + (place ^ ((i & 7) << 4)), from + i * kRowBytes,
                        row + i < rows);
    }
  }

  static __device__ __forceinline__ void a_fragment(std::uint32_t (&r)[4], const std::byte* base,
                                                    int row, int column, int lane) {
    tile::ldmatrix_x4(r, base + row * kRowBytes + place(lane & 15, lane >> 4, column));
  }
  static __device__ __forceinline__ void bt_fragments(std::uint32_t (&r)[4], const std::byte* base,
                                                      int row, int column, int lane) {
    tile::ldmatrix_x4(
        r, base + row * kRowBytes + place((lane & 7) | (lane >> 1 & 8), lane >> 3 & 1, column));
  }
  static __device__ __forceinline__ void b_fragments(std::uint32_t (&r)[4], const std::byte* base,
                                                     int row, int column, int lane) {
    tile::ldmatrix_x4_trans(r, base + row * kRowBytes + place(lane & 15, lane >> 4, column));
  }

 private:
  // offset(row, 2 column + half), in the form that leaves one instruction a column.
  static __device__ __forceinline__ int place(int row, int half, int column) {
    return row * kRowBytes + (((half ^ (row & 7)) << 4) ^ (column << 5));
  }
};

}  // namespace infllm::cuda::sm80
