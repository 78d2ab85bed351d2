// One vector of float32 from kLanes numbers of any type, and back. With intrinsics where GCC 12 would convert
// one by one.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace fastlm {

typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

struct Whole {};  // how much of a vector, or of a pack of them, lies in memory: all of it

inline Vector load_vector(const float* p) { return *reinterpret_cast<const Vector*>(p); }

#if defined(__AVX512F__)
inline Vector load_vector(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
}
inline Vector load_vector(const Half* p) {
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline Vector load_vector(const int8_t* p) {
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(wide));
}
#elif defined(__AVX2__)
inline Vector load_vector(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vector>(_mm256_slli_epi32(wide, 16));
}
inline Vector load_vector(const Half* p) {
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vector load_vector(const int8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(wide));
}
#else
template <class T>
Vector load_vector(const T* p) {
  Vector v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = to_float(p[lane]);
  return v;
}
#endif

inline void store_vector(Vector v, float* p) { *reinterpret_cast<Vector*>(p) = v; }

#if defined(__AVX2__)
// v rounded to bfloat16's precision, to nearest even, in the upper halves; NaN stays a quiet NaN.
inline Integers bfloat16_in_upper_halves(Vector v) {
  const Integers bits = reinterpret_cast<Integers>(v);
  const Integers rounded = bits + (bits >> 16 & 1) + 0x7fff;
  return v != v ? Integers{} + 0x7fc00000 : rounded;
}
#endif

#if defined(__AVX512F__)
inline void store_vector(Vector v, BFloat16* p) {
  const __m512i words = _mm512_srli_epi32(reinterpret_cast<__m512i>(bfloat16_in_upper_halves(v)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}
inline void store_vector(Vector v, Half* p) {
  const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
#elif defined(__AVX2__)
inline void store_vector(Vector v, BFloat16* p) {
  const __m256i words = _mm256_srli_epi32(reinterpret_cast<__m256i>(bfloat16_in_upper_halves(v)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_vector(Vector v, Half* p) {
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
#else
template <class T>
void store_vector(Vector v, T* p) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = from_float<T>(v[lane]);
}
#endif

// Lane i of the result is the sum of v[i]'s lanes, added in pairs: first within quarters of 4 lanes, where a
// shuffle is one cheap instruction, then the quarters.
inline Vector lane_sums(const Vector (&v)[kLanes]) {
  typedef int Index __attribute__((vector_size(4 * kLanes)));
  Index even, odd, low, high;  // of a's lanes, then of b's: neighbours in each quarter; every other quarter
  for (int lane = 0; lane < kLanes; ++lane) {
    const int quarter = lane / 4 * 4, place = lane % 4, half = kLanes / 2;
    even[lane] = quarter + 2 * (place % 2) + (place < 2 ? 0 : kLanes);
    odd[lane] = even[lane] + 1;
    low[lane] = lane % half / 4 * 8 + place + (lane < half ? 0 : kLanes);
    high[lane] = low[lane] + 4;
  }
  Vector sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = v[i];
  int n = kLanes;
  for (; n > kLanes / 4; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], even) +
                __builtin_shuffle(sums[2 * i], sums[2 * i + 1], odd);
    }
  }
  for (; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], low) +
                __builtin_shuffle(sums[2 * i], sums[2 * i + 1], high);
    }
  }
  return sums[0];
}

}  // namespace fastlm
