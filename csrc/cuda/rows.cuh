// What kernels on rows share: who works on a row, 16-byte accesses, sums over all who work on it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <initializer_list>

#include "../kernels.h"

namespace fastlm {

// Calls f.operator()<T>() with T = float, __half or __nv_bfloat16.
template <class F>
void with_device_dtype(DType dtype, F&& f) {
  with_dtype(dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, Half>) {
      f.template operator()<__half>();
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      f.template operator()<__nv_bfloat16>();
    } else {
      f.template operator()<float>();
    }
  });
}

// Elements of 16 bytes, the widest access.
template <class T>
constexpr int kWide = 16 / sizeof(T);

struct RowsAt {
  const void* data;
  int64_t stride = 0;  // elements from row to row
};

// Whether rows of `cols` elements of T can be read and written 16 bytes at a time, all of them. A null
// pointer can.
template <class T>
bool wide_rows(int64_t cols, std::initializer_list<RowsAt> all) {
  bool wide = cols % kWide<T> == 0;
  for (const RowsAt& rows : all) {
    wide &= reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % kWide<T> == 0;
  }
  return wide;
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Calls f.operator()<kWidth>(): elements of an access.
template <class T, class F>
void with_width(bool wide, F&& f) {
  with_bool(wide, [&]<bool kIsWide>() { f.template operator()<kIsWide ? kWide<T> : 1>(); });
}

// Who works on a row of at most kItems elements a thread: a warp, or a block, or a block that goes along it.
enum class Team { kWarp, kBlock, kLoop };

constexpr int kWarpThreads =
    128;  // of a block of warps with a row each: 16 such blocks fill a multiprocessor
constexpr int kLoopThreads = 512;

// Calls f.operator()<kTeam>(threads of a block).
template <int kItems, int kMostThreads, class F>
void with_team(int64_t cols, F&& f) {
  if (cols <= 32 * kItems) {
    f.template operator()<Team::kWarp>(kWarpThreads);
  } else if (cols <= kMostThreads * kItems) {
    f.template operator()<Team::kBlock>(static_cast<int>((cols + 32 * kItems - 1) / (32 * kItems) * 32));
  } else {
    f.template operator()<Team::kLoop>(kLoopThreads);
  }
}

template <Team kTeam>
int64_t blocks_for(int64_t rows, int threads) {
  const int64_t each = kTeam == Team::kWarp ? threads / 32 : 1;
  return (rows + each - 1) / each;
}

// A thread's place: the `thread`-th of `threads` that work on a row.
struct Place {
  int64_t row;
  int thread, threads;
};

template <Team kTeam>
__device__ Place place() {
  if constexpr (kTeam == Team::kWarp) {
    const int64_t warps = blockDim.x / 32;
    return {blockIdx.x * warps + threadIdx.x / 32, static_cast<int>(threadIdx.x % 32), 32};
  }
  return {blockIdx.x, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

// Elementwise kernels: a warp takes a piece of a row, kPieceItems elements a thread. A row of one dimension,
// however long, is spread over the whole GPU.
constexpr int kPieceItems = 8;  // 16 bytes of half precision: with 64 warps 32 KB of each operand under way
constexpr int64_t kPiece = 32 * kPieceItems;

inline int64_t pieces_of(int64_t cols) { return (cols + kPiece - 1) / kPiece; }
inline int64_t piece_blocks(int64_t rows, int64_t cols) {
  return (rows * pieces_of(cols) + kWarpThreads / 32 - 1) / (kWarpThreads / 32);
}

struct PiecePlace : Place {
  int64_t start;  // its first column
};

// Of the warp that calls, with `pieces` to a row; its row may be past the last.
__device__ inline PiecePlace piece_place(int64_t pieces) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;
  return {{warp / pieces, static_cast<int>(threadIdx.x % 32), 32}, warp % pieces * kPiece};
}

// Calls f(i, col) for this thread's groups of kWidth columns in [start, end): its items i ... i + kWidth - 1.
// Neighbouring threads take neighbouring groups.
template <int kWidth, int kItems, class F>
__device__ void for_items(const Place& at, int64_t start, int64_t end, F&& f) {
#pragma unroll
  for (int i = 0; i < kItems; i += kWidth) {
    const int64_t col = start + static_cast<int64_t>(i) * at.threads + at.thread * kWidth;
    if (col < end) f(i, col);
  }
}

__device__ inline float as_float(float v) { return v; }
__device__ inline float as_float(__half v) { return __half2float(v); }
__device__ inline float as_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T rounded_to(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// kWidth elements as float32; 16-byte accesses where they are 16 bytes or more.
template <int kWidth, class T>
__device__ void load(const T* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = as_float(*from);
  } else {
    T values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; i += kWide<T>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      memcpy(values + i, &bits, 16);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = as_float(values[i]);
  }
}

// To global memory. nvcc cuts some assignments of a uint4 in four, those of rope among them: 4 times the
// sectors.
__device__ inline void store_16_bytes(const uint32_t (&bits)[4], void* to) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]),
               "r"(bits[3])
               : "memory");
}

template <int kWidth, class T>
__device__ void store(const float (&from)[kWidth], T* to) {
  if constexpr (kWidth == 1) {
    *to = rounded_to<T>(from[0]);
  } else {
    T values[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = rounded_to<T>(from[i]);
#pragma unroll
    for (int i = 0; i < kWidth; i += kWide<T>) {
      uint32_t bits[4];
      memcpy(bits, values + i, 16);
      store_16_bytes(bits, to + i);
    }
  }
}

// This thread's elements of a row from column `start` on; `outside` from `end` on.
template <int kWidth, int kItems, class T>
__device__ void load_items(const T* row, const Place& at, int64_t start, int64_t end, float (&to)[kItems],
                           float outside = 0) {
#pragma unroll
  for (float& v : to) v = outside;
  for_items<kWidth, kItems>(at, start, end, [&](int i, int64_t col) {
    float values[kWidth];
    load<kWidth>(row + col, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[i + k] = values[k];
  });
}

// Writes them to columns of a row.
template <int kWidth, int kItems, class T>
__device__ void store_items(const float (&from)[kItems], const Place& at, int64_t start, int64_t end,
                            T* row) {
  for_items<kWidth, kItems>(at, start, end, [&](int i, int64_t col) {
    float values[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = from[i + k];
    store<kWidth>(values, row + col);
  });
}

struct Add {
  static constexpr float kNothing = 0.0f;
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {  // of NaN and a number the number
  static constexpr float kNothing = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class V, class Op>
__device__ V warp_all(V v, Op op) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}

// Each of N numbers, over all threads of a row's team: all receive the same bits. The whole team calls it.
template <Team kTeam, class V, class Op, int N>
__device__ void team_all(V (&v)[N], Op op) {
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = warp_all(v[k], op);
  if constexpr (kTeam != Team::kWarp) {
    __shared__ V of_warps[N][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // the call before may still read of_warps
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (lane == 0) of_warps[k][warp] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = warp_all<V>(lane < warps ? of_warps[k][lane] : Op::kNothing, op);
  }
}

template <Team kTeam>
__device__ float team_sum(float v) {
  float all[1] = {v};
  team_all<kTeam>(all, Add{});
  return all[0];
}

template <Team kTeam>
__device__ float team_max(float v) {
  float all[1] = {v};
  team_all<kTeam>(all, Max{});
  return all[0];
}

template <class T>
__device__ const T* row_at(const void* base, int64_t stride, int64_t row) {
  return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

template <class T>
__device__ T* row_at(void* base, int64_t cols, int64_t row) {
  return base ? static_cast<T*>(base) + row * cols : nullptr;
}

}  // namespace fastlm
