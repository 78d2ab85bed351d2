// Products of tiles in shared memory with float32 sums in registers: tensor cores for half precision, plain
// multiply-adds for float32, which keeps its full precision. One layout for both, so that what happens to a
// tile in registers is written once: a warp has 16 rows, and of 8 columns x[n][0], x[n][1] are row
// lane / 4, columns 8 n + 2 (lane % 4) and the next; x[n][2], x[n][3] the same of row lane / 4 + 8. That is
// mma.sync's layout of sums (PTX ISA, "Matrix Fragments for mma.m16n8k16").
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace fastlm {

// Elements from row to row of a tile: 16 bytes more than a row has, so that neither 8 rows side by side
// (ldmatrix) nor 4 rows two apart (float32) share a bank.
template <class T, int kCols>
constexpr int kPitch = kCols + kWide<T>;

// Where a thread's numbers are in its warp's tile.
__device__ inline int lane_row() { return static_cast<int>(threadIdx.x % 32 / 4); }
__device__ inline int lane_col() { return static_cast<int>(threadIdx.x % 4 * 2); }

template <int kCols>
using Sums = float[kCols / 8][4];

template <int kCols>
__device__ void set_zero(Sums<kCols>& x) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0;
  }
}

// Calls f(n, e, row, col) for each of a thread's numbers of 16 rows and kCols columns.
template <int kCols, class F>
__device__ void for_numbers(F&& f) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(n, e, lane_row() + 8 * (e / 2), lane_col() + 8 * n + e % 2);
  }
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts to copy 16 bytes to shared memory; zeros where `inside` is false, and then nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kGroups>
__device__ void wait_for_copies() {  // all but the last kGroups groups
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Rows of a matrix in global memory, each 16-byte aligned.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Starts to copy rows first ... first + kRows - 1 of a matrix of `count` rows; zeros outside it.
template <class T, int kRows, int kCols, int kThreads>
__device__ void copy_rows_async(T* to, const Matrix<T>& from, int first, int count) {
  constexpr int kChunks = kCols / kWide<T>;
#pragma unroll 4
  for (int chunk = threadIdx.x; chunk < kRows * kChunks; chunk += kThreads) {
    const int row = chunk / kChunks, col = chunk % kChunks * kWide<T>;
    const bool inside = first + row < count;
    const int64_t at = inside ? static_cast<int64_t>(first + row) * from.stride + col : 0;
    copy_async(to + row * kPitch<T, kCols> + col, from.data + at, inside);
  }
}

// Four 8 x 8 matrices of 16-bit numbers: lane 8 m + r gives the address of row r of matrix m.
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

__device__ inline float4 float4_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

__device__ inline float dot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// c += a b^T: a warp's 16 rows of a tile by kCols rows of another, both kDepth wide.
template <class T, int kCols, int kDepth>
__device__ void add_product_of_rows(Sums<kCols>& c, const T* a, const T* b) {
  constexpr int kRow = kPitch<T, kDepth>;
  if constexpr (sizeof(T) == 2) {
    const int lane = threadIdx.x % 32;
    a += lane % 16 * kRow + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t of_a[4], of_b[4];
      load_matrices<false>(of_a, a + k);
#pragma unroll
      for (int n = 0; n < kCols / 8; n += 2) {
        load_matrices<false>(of_b, b + n * 8 * kRow + k);
        multiply<T>(c[n], of_a, of_b[0], of_b[1]);
        multiply<T>(c[n + 1], of_a, of_b[2], of_b[3]);
      }
    }
  } else {
    a += lane_row() * kRow;
    b += lane_col() * kRow;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 8) {  // 8 products' sum first: its rounding error is half a long sum's
      const float4 upper[2] = {float4_at(a + k), float4_at(a + k + 4)};
      const float4 lower[2] = {float4_at(a + 8 * kRow + k), float4_at(a + 8 * kRow + k + 4)};
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const T* const row = b + (8 * n + e) * kRow + k;
          const float4 other[2] = {float4_at(row), float4_at(row + 4)};
          c[n][e] += dot(upper[1], other[1], dot(upper[0], other[0], 0));
          c[n][e + 2] += dot(lower[1], other[1], dot(lower[0], other[0], 0));
        }
      }
    }
  }
}

// c += p b in float32; up to four blocks of 8 columns at a time: 16 sums beside c.
template <int kCols, int kDepth, int kPitchOfB>
__device__ void add_float_product(Sums<kCols>& c, const Sums<kDepth>& p, const float* b) {
  constexpr int kGroup = kCols % 32 == 0 ? 4 : 2;
  b += lane_col();
#pragma unroll
  for (int first = 0; first < kCols / 8; first += kGroup) {
    float sums[kGroup][4] = {};  // a tile's alone: one long sum's rounding error grows with its length
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {  // of the four lanes of a row k % 8 / 2 has column k
      const float upper = __shfl_sync(0xffffffffu, p[k / 8][k % 2], k % 8 / 2, 4);
      const float lower = __shfl_sync(0xffffffffu, p[k / 8][k % 2 + 2], k % 8 / 2, 4);
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        const float2 both = *reinterpret_cast<const float2*>(b + k * kPitchOfB + (first + n) * 8);
        sums[n][0] = fmaf(upper, both.x, sums[n][0]);
        sums[n][1] = fmaf(upper, both.y, sums[n][1]);
        sums[n][2] = fmaf(lower, both.x, sums[n][2]);
        sums[n][3] = fmaf(lower, both.y, sums[n][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[first + n][e] += sums[n][e];
    }
  }
}

// c += p b: a warp's 16 x kDepth numbers, rounded to T, by kCols columns of a tile of kDepth rows.
template <class T, int kCols, int kDepth, int kPitchOfB>
__device__ void add_product(Sums<kCols>& c, const Sums<kDepth>& p, const T* b) {
  if constexpr (sizeof(T) == 4) {
    add_float_product<kCols, kDepth, kPitchOfB>(c, p, b);
  } else {
    const int lane = threadIdx.x % 32;
    b += lane % 16 * kPitchOfB + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint32_t of_p[4] = {packed<T>(p[2 * k][0], p[2 * k][1]), packed<T>(p[2 * k][2], p[2 * k][3]),
                                packed<T>(p[2 * k + 1][0], p[2 * k + 1][1]),
                                packed<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kCols / 8; n += 2) {
        uint32_t of_b[4];
        load_matrices<true>(of_b, b + k * 16 * kPitchOfB + n * 8);
        multiply<T>(c[n], of_p, of_b[0], of_b[1]);
        multiply<T>(c[n + 1], of_p, of_b[2], of_b[3]);
      }
    }
  }
}

// Of each of a thread's two rows, over the four lanes that have it.
template <class Op>
__device__ float row_all(float v, Op op) {
  v = op(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return op(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// Writes a warp's 16 rows of kCols numbers times factor[row / 8], by way of `staging` in shared memory, to
// the first `rows` rows at `to`: 16 bytes a lane, neighbours side by side.
template <class T, int kCols, int kPitchOfStaging>
__device__ void store_tile(const Sums<kCols>& x, const float (&factor)[2], T* staging, T* to, int64_t stride,
                           int rows) {
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* const place = staging + (lane_row() + 8 * half) * kPitchOfStaging + lane_col() + 8 * n;
      const float low = x[n][2 * half] * factor[half], high = x[n][2 * half + 1] * factor[half];
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(place) = packed<T>(low, high);
      } else {
        *reinterpret_cast<float2*>(place) = {low, high};
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kCols / kWide<T>;
  for (int chunk = threadIdx.x % 32; chunk < 16 * kChunks; chunk += 32) {
    const int row = chunk / kChunks, col = chunk % kChunks * kWide<T>;
    if (row < rows) {
      *reinterpret_cast<uint4*>(to + row * stride + col) =
          *reinterpret_cast<const uint4*>(staging + row * kPitchOfStaging + col);
    }
  }
}

}  // namespace fastlm
