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

// Elementwise kernels: a warp takes a piece of a row, kItems elements a thread. A row of one dimension,
// however long, is spread over the whole GPU.
constexpr int kPieceItems =
    16;  // two loads of half precision: what a thread does once costs as much as 4 elements
constexpr int64_t kPiece = 32 * kPieceItems;

inline int64_t pieces_of(int64_t cols, int64_t piece = kPiece) { return (cols + piece - 1) / piece; }
inline int64_t piece_blocks(int64_t rows, int64_t cols, int64_t piece = kPiece) {
  return (rows * pieces_of(cols, piece) + kWarpThreads / 32 - 1) / (kWarpThreads / 32);
}

struct PiecePlace : Place {
  int64_t start;  // its first column
};

// Of the warp that calls, with `pieces` of `piece` columns to a row; its row may be past the last. Dividing a
// warp's number, of 64 bits, costs twice what dividing the block's does.
__device__ inline PiecePlace piece_place(int64_t pieces, int64_t piece = kPiece) {
  constexpr unsigned kWarps = kWarpThreads / 32;
  const unsigned in_row = static_cast<unsigned>(pieces), rows = blockIdx.x / in_row;
  unsigned at = (blockIdx.x - rows * in_row) * kWarps + threadIdx.x / 32;  // from the first of kWarps rows on
  int64_t row = static_cast<int64_t>(rows) * (blockDim.x / 32);
#pragma unroll
  for (unsigned k = 1; k < kWarps; ++k) {
    if (at >= in_row) at -= in_row, ++row;
  }
  return {{row, static_cast<int>(threadIdx.x % 32), 32}, at * piece};
}

// Calls f(i, col) for this thread's groups of kWidth columns in [start, end): its items i ... i + kWidth - 1.
// Neighbouring threads take neighbouring groups.
template <int kWidth, int kItems, class F>
__device__ void for_items(const Place& at, int64_t start, int64_t end, F&& f) {
  constexpr int64_t kFar = 1 << 30;  // further than any item; 32 bits compare in one instruction
  const int first = at.thread * kWidth, left = static_cast<int>(max(min(end - start, kFar), int64_t{0}));
#pragma unroll
  for (int i = 0; i < kItems; i += kWidth) {
    const int item = first + i * at.threads;
    if (item < left) f(i, start + item);
  }
}

// Tells the compiler that a warp or a block has a row of `cols` columns at once: no 64 bits to compare. By
// the element it would keep 16 addresses in registers, and spill.
template <Team kTeam, int kWidth>
__device__ void assume_at_once(int64_t cols) {
  if constexpr (kTeam != Team::kLoop && kWidth > 1) __builtin_assume(cols >= 0 && cols <= 1 << 20);
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

// kWidth elements as they lie in memory, in half the registers of float32 where they are half precision.
template <int kWidth, class T>
struct Packed {
  uint32_t words[kWidth * sizeof(T) / 4];
};
template <class T>
struct Packed<1, T> {
  T value;
};

template <int kWidth, class T>
__device__ void load(const T* from, Packed<kWidth, T>& to) {
  if constexpr (kWidth == 1) {
    to.value = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / kWide<T>; ++i) {
      const uint4 bits = reinterpret_cast<const uint4*>(from)[i];
      to.words[4 * i] = bits.x, to.words[4 * i + 1] = bits.y;
      to.words[4 * i + 2] = bits.z, to.words[4 * i + 3] = bits.w;
    }
  }
}

template <int kWidth, class T>
__device__ void store(const Packed<kWidth, T>& from, T* to) {
  if constexpr (kWidth == 1) {
    *to = from.value;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / kWide<T>; ++i) {
      const uint32_t* words = from.words + 4 * i;
      reinterpret_cast<uint4*>(to)[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// By words: what takes a word's halves apart as it loads keeps twice the registers and waits for the load.
template <int kWidth, class T>
__device__ void unpack(const Packed<kWidth, T>& from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = as_float(from.value);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t word = from.words[i * sizeof(T) / 4];
      if constexpr (std::is_same_v<T, float>) {
        to[i] = __uint_as_float(word);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        to[i] = __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
      } else {
        to[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? word >> 16 : word)));
      }
    }
  }
}

template <class T, int kWidth>
__device__ Packed<kWidth, T> packed(const float (&from)[kWidth]) {
  Packed<kWidth, T> to;
  if constexpr (kWidth == 1) {
    to.value = rounded_to<T>(from[0]);
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to.words[i] = __float_as_uint(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
        memcpy(&to.words[i / 2], &pair, 4);
      } else {
        const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
        memcpy(&to.words[i / 2], &pair, 4);
      }
    }
  }
  return to;
}

// kWidth elements as float32; 16-byte accesses where they are 16 bytes or more.
template <int kWidth, class T>
__device__ void load(const T* from, float (&to)[kWidth]) {
  Packed<kWidth, T> values;
  load(from, values);
  unpack(values, to);
}

template <int kWidth, class T>
__device__ void store(const float (&from)[kWidth], T* to) {
  store(packed<T>(from), to);
}

// As store, in whole accesses: which nvcc may not cut in four. It does where it sees nothing that
// needs 16 bytes at once, for four times the sectors; else store leaves it more freedom.
template <int kWidth, class T>
__device__ void store_whole(const float (&from)[kWidth], T* to) {
  const Packed<kWidth, T> values = packed<T>(from);
  if constexpr (kWidth == 1) {
    store(values, to);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / kWide<T>; ++i) {
      const uint32_t* const words = values.words + 4 * i;
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + i * kWide<T>), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// 2^x; of what is smaller than 2^-126 it gives 0.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x) within 2e-7, 0 below 1.2e-38: two instructions, where expf takes eight.
__device__ inline float exp_of(float x) { return exp2_of(x * kLog2E); }

// What is taken from scores of which `highest` is the largest: -inf - -inf is NaN.
__device__ inline float shift_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// 1 / x within 1 ulp, 0 above 8.5e37: one instruction, where a division takes eight and a branch.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// This thread's elements of a row from column `start` on, all on their way before one is used.
template <int kWidth, int kItems, class T>
__device__ void load_items(const T* row, const Place& at, int64_t start, int64_t end,
                           Packed<kWidth, T> (&to)[kItems / kWidth]) {
  for_items<kWidth, kItems>(at, start, end, [&](int i, int64_t col) { load(row + col, to[i / kWidth]); });
}

// As float32, `outside` from `end` on.
template <int kWidth, int kItems, class T>
__device__ void load_items(const T* row, const Place& at, int64_t start, int64_t end, float (&to)[kItems],
                           float outside = 0) {
  Packed<kWidth, T> loaded[kItems / kWidth];
  load_items<kWidth, kItems>(row, at, start, end, loaded);
#pragma unroll
  for (float& v : to) v = outside;
  for_items<kWidth, kItems>(at, start, end, [&](int i, int64_t) {
    float values[kWidth];
    unpack(loaded[i / kWidth], values);
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
