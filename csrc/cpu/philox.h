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
// A word in each 64 bits: a product is then the low word as it stands and the high word after one shift; what
// lies in the upper halves is never read. Two groups of four counters go side by side: one alone waits for
// its own multiplications, four do not fit into the registers.
inline void philox(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  constexpr int kGroups = 2;
  const __m256i a = _mm256_set1_epi64x(kPhiloxA), b = _mm256_set1_epi64x(kPhiloxB);
  const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);  // in which the stores below read the counters
  for (uint32_t begin = 0; begin < kPhiloxCounters; begin += 4 * kGroups) {
    __m256i x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t counter = first + begin + 4 * static_cast<uint32_t>(g);
      x0[g] = _mm256_add_epi64(_mm256_set1_epi64x(counter), order);
      x1[g] = _mm256_set1_epi64x(c1);
      x2[g] = _mm256_set1_epi64x(c2);
      x3[g] = _mm256_set1_epi64x(c3);
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += kWeylA, k1 += kWeylB) {
      for (int g = 0; g < kGroups; ++g) {
        const __m256i product0 = _mm256_mul_epu32(x0[g], a), product2 = _mm256_mul_epu32(x2[g], b);
        __m256i keyed1 = x1[g] ^ _mm256_set1_epi64x(k0), keyed3 = x3[g] ^ _mm256_set1_epi64x(k1);
        asm("" : "+x"(keyed1), "+x"(keyed3));  // or GCC adds the key last, where all wait for it
        x0[g] = _mm256_srli_epi64(product2, 32) ^ keyed1;
        x2[g] = _mm256_srli_epi64(product0, 32) ^ keyed3;
        x1[g] = product2;
        x3[g] = product0;
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      const __m256i low = _mm256_blend_epi32(x0[g], _mm256_slli_epi64(x1[g], 32), 0xAA);
      const __m256i high = _mm256_blend_epi32(x2[g], _mm256_slli_epi64(x3[g], 32), 0xAA);
      __m256i* const to = reinterpret_cast<__m256i*>(out + 4 * begin + 16 * g);
      _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low, high));
      _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low, high));
    }
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

  // scales[i] = 0 or 1 / (1 - p) for columns begin + i, i in [0, kPhiloxNumbers), at counter
  // (column >> 2, c1, c2, 0); begin is a multiple of 4.
  void columns(uint32_t c1, uint32_t c2, int64_t begin, float* scales) const {
    uint32_t numbers[kPhiloxNumbers];
    philox(key_, static_cast<uint32_t>(begin >> 2), c1, c2, 0, numbers);
    const uint32_t threshold = threshold_;  // copies: `scales` might alias the members
    const float scale = scale_;
#pragma omp simd
    for (int i = 0; i < kPhiloxNumbers; ++i) scales[i] = numbers[i] >= threshold ? scale : 0.0f;
  }

  void columns(int64_t row, int64_t begin, float* scales) const {
    const uint64_t r = static_cast<uint64_t>(row);
    columns(static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), begin, scales);
  }

  // values[i] *= the scale of column begin + i of `row`, i in [0, n); begin is a multiple of 4.
  [[gnu::noinline]] void apply(int64_t row, int64_t begin, int64_t n, float* values) const {
    float scales[kPhiloxNumbers];
    for (int64_t i = 0; i < n; i += kPhiloxNumbers) {
      columns(row, begin + i, scales);
      const int64_t count = n - i < kPhiloxNumbers ? n - i : kPhiloxNumbers;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) values[i + k] *= scales[k];
    }
  }

 private:
  uint64_t key_;
  uint32_t threshold_;
  float scale_;
};

}  // namespace fastlm
