// Products of a cache with tensor cores: mma.sync m16n8k16, its operands from plain rows of numbers of any
// type.
//
// Of half precision an operand is what it is; int8 is exact in either half. A float32 is, exactly, a sum of
// three bfloat16 of ever smaller parts: products of the larger parts then give 2^-24 of a product at worst
// (Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", https://arxiv.org/abs/1904.06376). Fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace fastlm {

// What tensor cores multiply for a T, and in how many parts.
template <class T>
struct Operand {
  using Type = T;
  static constexpr int kParts = 1;
};
template <>
struct Operand<float> {
  using Type = __nv_bfloat16;
  static constexpr int kParts = 3;
};
template <>
struct Operand<int8_t> {
  static constexpr int kParts = 1;
};

// kCount neighbouring numbers of a row, 4, 8 or 16 bytes.
template <class T, int kCount>
struct Words {
  static constexpr int kBytes = kCount * sizeof(T);
  using Access = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  uint32_t word[kBytes / 4];
};

// Columns col ... of a row of `cols`, 0 past its end.
template <class T, int kCount>
__device__ void read(const T* row, int col, int cols, Words<T, kCount>& to) {
  T values[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (col + i < cols) values[i] = row[col + i];
  }
  memcpy(to.word, values, to.kBytes);
}

// Two floats as kParts registers of two T: what the first leaves over is in the second, and so on.
template <class T, int kParts>
__device__ void split(float low, float high, uint32_t (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = packed<T>(low, high);
    if constexpr (kParts > 1) {
      low -= __uint_as_float(parts[i] << 16);
      high -= __uint_as_float(parts[i] & 0xffff0000u);
    }
  }
}

// Two bytes of int8, in the lower half of `bytes`, as two T, exactly. Not cvt: a quarter of the rate. 0x80 is
// added to a byte that becomes the lowest bits of a number whose own bits are known.
template <class T>
__device__ uint32_t from_bytes(uint32_t bytes) {
  bytes ^= 0x8080u;
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t biased = __byte_perm(bytes, 0x64646464u, 0x4140);  // 1024 + byte
    __half2 both;
    memcpy(&both, &biased, 4);
    both = __hsub2(both, __half2{__ushort_as_half(0x6480), __ushort_as_half(0x6480)});  // 1024 + 128
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
  } else {
    const float low = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7650));  // 2^23 + byte
    const float high = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7651));
    return packed<T>(low - 8388736.0f, high - 8388736.0f);
  }
}

// Number i of a and number j of b as kParts registers of two T.
template <class T, class From, int kCount, int kParts>
__device__ void pair(const Words<From, kCount>& a, int i, const Words<From, kCount>& b, int j,
                     uint32_t (&parts)[kParts]) {
  constexpr int kEach = 4 / sizeof(From);
  const uint32_t first = a.word[i / kEach], second = b.word[j / kEach];
  if constexpr (std::is_same_v<From, float>) {
    split<T>(__uint_as_float(first), __uint_as_float(second), parts);
  } else if constexpr (std::is_same_v<From, int8_t>) {
    parts[0] = from_bytes<T>(__byte_perm(first, second, i % 4 | (j % 4 + 4) << 4));
  } else {
    const int low = i % 2 * 2, high = j % 2 * 2 + 4;
    parts[0] = __byte_perm(first, second, low | (low + 1) << 4 | high << 8 | (high + 1) << 12);
  }
}

template <class T>
__device__ void multiply(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  multiply<T>(sum, {a.x, a.y, a.z, a.w}, b0, b1);
}

// sum += a b for a of 16 rows and 16 columns, b of 16 rows and 8 columns. Of several parts the smallest
// products come first, and the sum is added in full precision: tensor cores cut what they add.
template <class T, int kA, int kB>
__device__ void multiply_add(float (&sum)[4], const uint4 (&a)[kA], const uint32_t (&b0)[kB],
                             const uint32_t (&b1)[kB]) {
  if constexpr (kA == 1 && kB == 1) {
    multiply<T>(sum, a[0], b0[0], b1[0]);
  } else {
    float products[4] = {};
#pragma unroll
    for (int order = 2; order >= 0; --order) {
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const int j = order - i;
        if (j >= 0 && j < kB) multiply<T>(products, a[i], b0[j], b1[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += products[i];
  }
}

}  // namespace fastlm
