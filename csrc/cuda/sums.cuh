// Gradients of weights and biases: blocks of rows leave partial sums, which are added in their order here.
#pragma once

#include "launch.cuh"
#include "parameters.cuh"
#include "rows.cuh"

namespace fastlm {

// The rows of block `block` of `blocks`: [first, last).
struct RowRange {
  int64_t first, last;
};
__device__ inline RowRange rows_of_block(int64_t rows, int64_t block, int64_t blocks) {
  return {block * rows / blocks, (block + 1) * rows / blocks};
}

// Writes a block's sums of columns [start, cols) to out, where column 0 is: those of its warps, where each
// had rows of its own, added up in order.
template <int kWidth, Team kTeam, int kItems>
__device__ void store_sums(const Place& at, int64_t start, int64_t cols, const float (&sums)[kItems],
                           float* out) {
  if constexpr (kTeam == Team::kBlock) {
    store_items<kWidth>(sums, at, start, cols, out);
  } else {
    constexpr int kPitch = 32 + 32 / kWidth;  // of an item of all lanes: those of 32 columns meet in no bank
    __shared__ float of_warps[kWarpThreads / 32][kItems * kPitch];
    __syncthreads();  // the call before may still read of_warps
#pragma unroll
    for (int i = 0; i < kItems; ++i) of_warps[threadIdx.x / 32][i * kPitch + at.thread] = sums[i];
    __syncthreads();
    const int last = static_cast<int>(min(cols - start, static_cast<int64_t>(32 * kItems)));
    for (int col = threadIdx.x; col < last; col += kWarpThreads) {
      const int item = col / (32 * kWidth) * kWidth + col % kWidth;
      const int place = item * kPitch + col / kWidth % 32;
      float sum = of_warps[0][place];
#pragma unroll
      for (int warp = 1; warp < kWarpThreads / 32; ++warp) sum += of_warps[warp][place];
      out[start + col] = sum;
    }
  }
}

constexpr int kSumCols = 32, kSumParts = 16;  // of a block: 128 bytes of columns, 16 partial sums at a time

// The sums of `count` parameters' gradients: that of out[k][col] over partial[block][k][col].
struct Sums {
  ParameterGradient out[2];  // null: not wanted
};

// Each of kSumParts threads adds up every kSumParts-th block's, then one adds these. A column's 512 partial
// sums take 32 steps.
static __global__ void add_partials_kernel(const float* partial, int64_t blocks, int64_t cols, int count,
                                           int64_t across, DType dtype, const Sums sums) {
  __shared__ float of_part[kSumParts][kSumCols];
  const int lane = threadIdx.x % kSumCols, part = threadIdx.x / kSumCols;
  const int which = blockIdx.x >= across;
  // One by one: a choice between two structs would take local memory.
  const ParameterGradient out = {which ? sums.out[1].data : sums.out[0].data,
                                 which ? sums.out[1].narrow : sums.out[0].narrow};
  if (!out.data) return;
  const int64_t col = (blockIdx.x - which * across) * kSumCols + lane;
  float sum = 0;
  if (col < cols) {
    partial += which * cols + col;
    for (int64_t block = part; block < blocks; block += kSumParts) sum += partial[block * count * cols];
  }
  of_part[part][lane] = sum;
  __syncthreads();
  if (part > 0 || col >= cols) return;
#pragma unroll
  for (int k = 1; k < kSumParts; ++k) sum += of_part[k][lane];
  store_parameter(sum, out, dtype, col);
}

// Launches it for `count` gradients of `cols` columns beside rows of `dtype`, unless none is wanted.
inline void add_partials(const char* op, const Context& context, DType dtype, const float* partial,
                         int64_t blocks, int64_t cols, int count, const Sums& sums) {
  if (!sums.out[0].data && !sums.out[1].data) return;
  const int64_t across = (cols + kSumCols - 1) / kSumCols;
  launch(op, context, add_partials_kernel, across * count, kSumCols * kSumParts, 0, partial, blocks, cols,
         count, across, dtype, sums);
}

}  // namespace fastlm
