// Some vectors of float32 worked on side by side. A long chain of operations waits for each of its results,
// and the processor looks only 2 or 3 turns of a loop ahead for other work; side by side, the work is next to
// each other. gelu_tanh forward in 1, 2, 4 vectors: 0.54, 0.50, 0.45 ns an element, backward 0.79, 0.69,
// 0.56.
#pragma once

#include <algorithm>
#include <cstdint>

#include "streaming.h"

namespace fastlm {

constexpr int kPackVectors = 4;
constexpr int kPackNumbers = kPackVectors * kLanes;

using Pack = Packed<kPackVectors>;

// The pack of f(i), the vectors i.
template <class F>
FASTLM_INLINE Pack pack_of(const F& f) {
  return packed<kPackVectors>(f);
}

template <class F>
FASTLM_INLINE void each_vector(const F& f) {
  f(0), f(1), f(2), f(3);
}

// The larger or smaller of x and a bound; NaN stays. GCC 12 makes two instructions of a comparison and a
// choice, where the hardware has one.
FASTLM_INLINE Vector at_least(float low, Vector x) {
  const Vector bound = Vector{} + low;
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_max_ps(bound, x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_max_ps(bound, x));
#elif defined(__SSE2__)
  return reinterpret_cast<Vector>(_mm_max_ps(bound, x));
#else
  return bound > x ? bound : x;
#endif
}
FASTLM_INLINE Vector at_most(float high, Vector x) {
  const Vector bound = Vector{} + high;
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_min_ps(bound, x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_min_ps(bound, x));
#elif defined(__SSE2__)
  return reinterpret_cast<Vector>(_mm_min_ps(bound, x));
#else
  return bound < x ? bound : x;
#endif
}
FASTLM_INLINE Pack at_least(float low, const Pack& x) {
  return pack_of([&](int i) { return at_least(low, x.v[i]); });
}
FASTLM_INLINE Pack at_most(float high, const Pack& x) {
  return pack_of([&](int i) { return at_most(high, x.v[i]); });
}

FASTLM_INLINE Pack magnitude(const Pack& x) {
  return pack_of(
      [&](int i) { return reinterpret_cast<Vector>(reinterpret_cast<Integers>(x.v[i]) & 0x7fffffff); });
}

// yes where x < 0, else no.
FASTLM_INLINE Pack where_negative(const Pack& x, const Pack& yes, const Pack& no) {
  return pack_of([&](int i) { return x.v[i] < 0.0f ? yes.v[i] : no.v[i]; });
}

// y, but 0 where x <= 0.
FASTLM_INLINE Pack zero_unless_positive(const Pack& x, const Pack& y) {
  return pack_of([&](int i) { return x.v[i] <= 0.0f ? Vector{} : y.v[i]; });
}

// exp(x), |x| <= 88; a NaN gives anything. 2^n is multiplied by adding n to the exponent in the bits. At -88
// the result is subnormal (kernels flush it to 0). ln(2) in one piece, and the product with it rounded where
// there is no fused multiply-add, put what is far from 1 off: up to |x| = 5 it is within 1.2 ulp, at 88
// within 4.6 (68 without); silu stays within 1.8e-7 of its value from -10 on (6.6e-7). The polynomial was
// fitted to 4e-9 relative error (iterated weighted least squares, 20001 points).
FASTLM_INLINE Pack exp_bounded(const Pack& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  const Pack shifted = x * 1.44269504f + kRound;
  const Pack r = x - (shifted - kRound) * 0.693147182f;
  Pack p = r * 1.38144672e-3f + 8.36878084e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 0.499999940f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return pack_of([&](int i) {
    const Integers exponent = reinterpret_cast<Integers>(shifted.v[i]) << 23;
    return reinterpret_cast<Vector>(reinterpret_cast<Integers>(p.v[i]) + exponent);
  });
}

// How packs of each type are read and written. Without AVX2, converting is left to the loops of rows.h.
FASTLM_INLINE Pack load_pack(const float* p) {
  return pack_of([&](int i) { return load_vector(p + i * kLanes); });
}
FASTLM_INLINE void store_pack(const Pack& x, float* out) {
  each_vector([&](int i) { store_vector(x.v[i], out + i * kLanes); });
}

#if defined(__AVX2__)
template <class T>
FASTLM_INLINE Pack load_pack(const T* p) {
  const Two low = load_two(p), high = load_two(p + kTwoNumbers);
  return {{low.v[0], low.v[1], high.v[0], high.v[1]}};
}
template <class T>
FASTLM_INLINE void store_pack(const Pack& x, T* out) {
  store_two({{x.v[0], x.v[1]}}, out);
  store_two({{x.v[2], x.v[3]}}, out + kTwoNumbers);
}
#else
template <class T>
Pack load_pack(const T* p) {
  float numbers[kPackNumbers];
  load_row(p, kPackNumbers, numbers);
  return load_pack(numbers);
}
template <class T>
void store_pack(const Pack& x, T* out) {
  float numbers[kPackNumbers];
  store_pack(x, numbers);
  store_row(numbers, kPackNumbers, out);
}
#endif

// Around the caches, to whole lines.
FASTLM_INLINE void stream_pack(const Pack& x, float* out) {
  each_vector([&](int i) { stream_vector(x.v[i], out + i * kLanes); });
}
template <class T>
FASTLM_INLINE void stream_pack(const Pack& x, T* out) {
  alignas(64) T numbers[kPackNumbers];
  store_pack(x, numbers);
  stream_bytes<sizeof(numbers)>(numbers, out);
}

struct First {  // only a pack's first n numbers lie in memory
  int64_t n;
};

template <class T>
FASTLM_INLINE Pack load_pack(const T* p, Whole) {
  return load_pack(p);
}
template <class T>
FASTLM_INLINE Pack load_pack(const T* p, First size) {
  T numbers[kPackNumbers] = {};
  std::copy_n(p, size.n, numbers);
  return load_pack(numbers);
}

template <class T>
FASTLM_INLINE void store_pack(const Pack& x, T* out, Whole) {
  store_pack(x, out);
}
template <class T>
FASTLM_INLINE void store_pack(const Pack& x, T* out, First size) {
  T numbers[kPackNumbers];
  store_pack(x, numbers);
  std::copy_n(numbers, size.n, out);
}

// A kernel's result: `stream` is what streams() said of the output.
template <class T>
FASTLM_INLINE void store_result(const Pack& x, T* out, Whole, bool stream) {
  if (stream) return stream_pack(x, out);
  store_pack(x, out);
}
template <class T>
FASTLM_INLINE void store_result(const Pack& x, T* out, First size, bool) {
  store_pack(x, out, size);
}

// Runs f(j, size) over the packs of [0, n): Whole ones at j = 0, kPackNumbers, ..., then the First of the
// last.
template <class F>
FASTLM_INLINE void over_packs(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kPackNumbers <= n; j += kPackNumbers) f(j, Whole{});
  if (j < n) f(j, First{n - j});
}

}  // namespace fastlm
