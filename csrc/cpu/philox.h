// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), many counters at
// a time. floor: about 1 G numbers/s on two threads in plain loops, 2 G/s with the hardware's 32 x 32 -> 64
// bit multiplication of every second word.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace fastlm {

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;
constexpr uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;
constexpr int kPhiloxCounters = 16;                  // counters a call: one 512-bit vector of 32-bit words
constexpr int kPhiloxNumbers = 4 * kPhiloxCounters;  // numbers a call

#if defined(__AVX512F__)
// (high, low) words of a * m, lane by lane: even and odd lanes are multiplied apart, as the hardware does.
inline void multiply_wide(__m512i a, __m512i m, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_mul_epu32(a, m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

// out[4 * i + lane] for counters (first + i, c1, c2, c3), i in [0, kPhiloxCounters).
inline void philox(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i x0 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), iota);
  __m512i x1 = _mm512_set1_epi32(static_cast<int>(c1));
  __m512i x2 = _mm512_set1_epi32(static_cast<int>(c2));
  __m512i x3 = _mm512_set1_epi32(static_cast<int>(c3));
  const __m512i a = _mm512_set1_epi64(kPhiloxA), b = _mm512_set1_epi64(kPhiloxB);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += kWeylA, k1 += kWeylB) {
    __m512i high0, low0, high2, low2;
    multiply_wide(x0, a, high0, low0);
    multiply_wide(x2, b, high2, low2);
    x0 = _mm512_xor_si512(_mm512_xor_si512(high2, x1), _mm512_set1_epi32(static_cast<int>(k0)));
    x2 = _mm512_xor_si512(_mm512_xor_si512(high0, x3), _mm512_set1_epi32(static_cast<int>(k1)));
    x1 = low2;
    x3 = low0;
  }
  // Transpose four vectors of 16 into 16 groups of four.
  const __m512i p = _mm512_unpacklo_epi32(x0, x1), q = _mm512_unpackhi_epi32(x0, x1);
  const __m512i r = _mm512_unpacklo_epi32(x2, x3), s = _mm512_unpackhi_epi32(x2, x3);
  const __m512i g0 = _mm512_unpacklo_epi64(p, r), g1 = _mm512_unpackhi_epi64(p, r);
  const __m512i g2 = _mm512_unpacklo_epi64(q, s), g3 = _mm512_unpackhi_epi64(q, s);
  const __m512i low01 = _mm512_shuffle_i32x4(g0, g1, 0x44), high01 = _mm512_shuffle_i32x4(g0, g1, 0xEE);
  const __m512i low23 = _mm512_shuffle_i32x4(g2, g3, 0x44), high23 = _mm512_shuffle_i32x4(g2, g3, 0xEE);
  _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low01, low23, 0x88));
  _mm512_storeu_si512(out + 16, _mm512_shuffle_i32x4(low01, low23, 0xDD));
  _mm512_storeu_si512(out + 32, _mm512_shuffle_i32x4(high01, high23, 0x88));
  _mm512_storeu_si512(out + 48, _mm512_shuffle_i32x4(high01, high23, 0xDD));
}
#elif defined(__AVX2__)
// Every second word of a and of b: the even ones, or the odd ones.
template <int kOdd>
__m256i every_second(__m256i a, __m256i b) {
  constexpr int kWords = kOdd ? 0xdd : 0x88;
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kWords));
}

// Of each four words, the lower (0) or the upper (1) two of a, then of b.
template <int kOfA, int kOfB>
__m256i halves(__m256i a, __m256i b) {
  constexpr int kWords = 5 * kOfA + 10 * kOfB;
  return _mm256_castpd_si256(_mm256_shuffle_pd(_mm256_castsi256_pd(a), _mm256_castsi256_pd(b), kWords));
}

// A vector holds a word of eight counters. The hardware multiplies its even words and, shifted down, its odd
// ones; the high words of both products together are one vector, the low words another, with the middle two
// of each four swapped: x2 and x3, made of x0, have them so in every round, and x0 and x1, made of x2, in
// order. 14 instructions a round; a word in each 64 bits needs 16. Two vectors side by side hide latencies.
inline void philox(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  constexpr int kGroups = kPhiloxCounters / 8;
  const auto all = [](uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); };
  const __m256i a = all(kPhiloxA), b = all(kPhiloxB), iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    x0[g] = _mm256_add_epi32(all(first + 8 * static_cast<uint32_t>(g)), iota);
    x1[g] = all(c1);
    x2[g] = all(c2);
    x3[g] = all(c3);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += kWeylA, k1 += kWeylB) {
    for (int g = 0; g < kGroups; ++g) {
      const __m256i even0 = _mm256_mul_epu32(x0[g], a),
                    odd0 = _mm256_mul_epu32(_mm256_srli_epi64(x0[g], 32), a);
      const __m256i even2 = _mm256_mul_epu32(x2[g], b),
                    odd2 = _mm256_mul_epu32(_mm256_srli_epi64(x2[g], 32), b);
      __m256i keyed1 = x1[g] ^ all(k0), keyed3 = x3[g] ^ all(k1);
      asm("" : "+x"(keyed1), "+x"(keyed3));  // or GCC adds the key last, where all wait for it
      x0[g] = every_second<1>(even2, odd2) ^ keyed1;
      x2[g] = every_second<1>(even0, odd0) ^ keyed3;
      x1[g] = every_second<0>(even2, odd2);
      x3[g] = every_second<0>(even0, odd0);
    }
  }
  for (int g = 0; g < kGroups; ++g) {  // four vectors of 8 become 8 groups of four
    const __m256i low01 = _mm256_unpacklo_epi32(x0[g], x1[g]), high01 = _mm256_unpackhi_epi32(x0[g], x1[g]);
    const __m256i low23 = _mm256_unpacklo_epi32(x2[g], x3[g]), high23 = _mm256_unpackhi_epi32(x2[g], x3[g]);
    const __m256i p = halves<0, 0>(low01, low23), q = halves<1, 0>(low01, high23);
    const __m256i r = halves<0, 1>(high01, low23), s = halves<1, 1>(high01, high23);
    __m256i* const to = reinterpret_cast<__m256i*>(out + 32 * g);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(p, q, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(r, s, 0x20));
    _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(p, q, 0x31));
    _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(r, s, 0x31));
  }
}
#else
inline void philox(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  uint32_t x0[kPhiloxCounters], x1[kPhiloxCounters], x2[kPhiloxCounters], x3[kPhiloxCounters];
  for (int i = 0; i < kPhiloxCounters; ++i) {
    x0[i] = first + static_cast<uint32_t>(i);
    x1[i] = c1;
    x2[i] = c2;
    x3[i] = c3;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += kWeylA, k1 += kWeylB) {
#pragma omp simd
    for (int i = 0; i < kPhiloxCounters; ++i) {
      const uint64_t product0 = static_cast<uint64_t>(x0[i]) * kPhiloxA;
      const uint64_t product2 = static_cast<uint64_t>(x2[i]) * kPhiloxB;
      x0[i] = static_cast<uint32_t>(product2 >> 32) ^ x1[i] ^ k0;
      x2[i] = static_cast<uint32_t>(product0 >> 32) ^ x3[i] ^ k1;
      x1[i] = static_cast<uint32_t>(product2);
      x3[i] = static_cast<uint32_t>(product0);
    }
  }
  for (int i = 0; i < kPhiloxCounters; ++i) {
    out[4 * i] = x0[i];
    out[4 * i + 1] = x1[i];
    out[4 * i + 2] = x2[i];
    out[4 * i + 3] = x3[i];
  }
}
#endif

// One dropout, ready to apply: what to multiply an element with.
class DropoutScale {
 public:
  explicit DropoutScale(const Dropout& d)
      : key_(d.p > 0 ? static_cast<uint64_t>(*d.seed) : 0),
        threshold_(static_cast<uint32_t>(d.p * 4294967296.0)),
        scale_(static_cast<float>(1.0 / (1.0 - d.p))) {}

  // scales[i] = 0 or 1 / (1 - p) for columns begin + i, i in [0, n), at counter (column >> 2, c1, c2, 0);
  // begin is a multiple of 4, and scales has room for a whole number of kPhiloxNumbers. Many columns a call:
  // what all counters share costs a fourth of 64 numbers. Never inlined: larger functions leave too few
  // registers.
  [[gnu::noinline]] void columns(uint32_t c1, uint32_t c2, int64_t begin, int64_t n, float* scales) const {
    const uint64_t key = key_;  // copies: `scales` might alias the members
    const uint32_t threshold = threshold_;
    const float scale = scale_;
    for (int64_t j = 0; j < n; j += kPhiloxNumbers) {
      uint32_t numbers[kPhiloxNumbers];
      philox(key, static_cast<uint32_t>((begin + j) >> 2), c1, c2, 0, numbers);
#pragma omp simd
      for (int i = 0; i < kPhiloxNumbers; ++i) scales[j + i] = numbers[i] >= threshold ? scale : 0.0f;
    }
  }

  void columns(int64_t row, int64_t begin, int64_t n, float* scales) const {
    const uint64_t r = static_cast<uint64_t>(row);
    columns(static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), begin, n, scales);
  }

 private:
  uint64_t key_;
  uint32_t threshold_;
  float scale_;
};

}  // namespace fastlm
