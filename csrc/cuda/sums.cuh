// Gradients of weights and biases: blocks of rows leave partial sums, which are added in their order here.
#pragma once

#include "launch.cuh"

namespace fastlm {

constexpr int kSumCols = 32, kSumParts = 16;  // of a block: 128 bytes of columns, 16 partial sums at a time

// out[col] = the sum of partial[block * stride + col] over blocks: each of kSumParts threads adds up every
// kSumParts-th, then one adds these. A column's 512 partial sums take 32 steps.
static __global__ void add_partials_kernel(const float* partial, int64_t stride, int64_t blocks, int64_t cols,
                                           float* out) {
  __shared__ float of_part[kSumParts][kSumCols];
  const int lane = threadIdx.x % kSumCols, part = threadIdx.x / kSumCols;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumCols + lane;
  float sum = 0;
  if (col < cols) {
    for (int64_t block = part; block < blocks; block += kSumParts) sum += partial[block * stride + col];
  }
  of_part[part][lane] = sum;
  __syncthreads();
  if (part > 0 || col >= cols) return;
#pragma unroll
  for (int k = 1; k < kSumParts; ++k) sum += of_part[k][lane];
  out[col] = sum;
}

// Launches it, unless out is null: not wanted.
inline void add_partials(const char* op, const Context& context, const float* partial, int64_t stride,
                         int64_t blocks, int64_t cols, float* out) {
  if (!out) return;
  launch(op, context, add_partials_kernel, (cols + kSumCols - 1) / kSumCols, kSumCols * kSumParts, 0, partial,
         stride, blocks, cols, out);
}

}  // namespace fastlm
