// One vector of float32 from kLanes numbers of any type. With intrinsics where GCC 12 would convert one by
// one.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace fastlm {

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
