// float32 maths that the compiler vectorises: no branches, no calls, at most 2 ulp (tests/test_native.py).
// Written with a * b + c: -ffp-contract=fast fuses it where the instruction set can.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../dtype.h"

namespace fastlm {

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// float16 -> float32. A subnormal is mantissa * 2^-24: subtracting 0.5 from 0.5 + that is exact and, unlike
// a multiplication of denormals, survives flush-to-zero.
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + ((magnitude >= 0x7c00u ? 255u - 31u : 127u - 15u) << 23);
  const float subnormal = std::bit_cast<float>(0x3f000000u + magnitude) - 0.5f;
  const uint32_t bits = magnitude < 0x0400u ? std::bit_cast<uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(sign | bits);
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays a quiet NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

// Round to nearest even. Results below 2^-14 are rounded by adding 0.5: its last mantissa bit is worth 2^-24.
template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
}

inline float select(bool condition, float yes, float no) { return condition ? yes : no; }

// exp(r), |r| <= ln(2) / 2. Polynomial: Cephes expf (S. Moshier). Its pairs are summed side by side: one
// after the other the terms wait for each other longer than all else in a loop.
inline float exp_polynomial(float r) {
  const float square = r * r;
  const float low = 1.6666665459e-1f * r + 5.0000001201e-1f;
  const float middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
  const float high = 1.9875691500e-4f * r + 1.3981999507e-3f;
  return ((high * square + middle) * square + low) * square + r + 1.0f;
}

// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2. Results below 1.2e-38 are 0.
inline float exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLow = -87.33654f, kHigh = 88.72283f;
  const float clamped = select(x < kLow, kLow, select(x > kHigh, kHigh, x));
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // Half of n in each factor: 2^128 is not a float, but exp(88.7) is.
  const int32_t whole = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t half = whole >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((whole - half + 127) << 23);
  const float result = exp_polynomial(r) * first * second;
  const float high = select(x > kHigh, INFINITY, result);
  return select(x < kLow, 0.0f, high);
}

// exp(x) of x <= 0, good up to 88 and for NaN: one factor instead of two, and only the lower end is held. At
// -88 the factor is 0; what is below 1.2e-38 above that may be subnormal (kernels flush it).
inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;
  const float clamped = select(x < -88.0f, -88.0f, x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  const int32_t whole = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  return exp_polynomial(r) * std::bit_cast<float>((whole + 127) << 23);
}

// tanh: below 0.625 Cephes tanhf's polynomial (S. Moshier), above it 1 - 2 / (exp(2|x|) + 1).
inline float tanh(float x) {
  const float a = std::fabs(x);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  const float large = std::copysign(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), x);
  return select(a < 0.625f, small, large);
}

// erf: two polynomials joined at 0.927734375; coefficients from N. Juffa,
// https://stackoverflow.com/questions/35148198 (maximum error below 1 ulp with fused multiply-add).
inline float erf(float x) {
  const float a = std::fabs(x);
  const float s = x * x;
  float p = -1.72853470e-5f;
  p = p * a + 3.83197126e-4f;
  p = p * a - 3.88396438e-3f;
  p = p * a + 2.42546219e-2f;
  p = p * a - 1.06777877e-1f;
  p = p * a - 6.34846687e-1f;
  p = p * a - 1.28717512e-1f;
  p = p * a - a;
  const float large = std::copysign(1.0f - exp_nonpositive(p), x);
  float q = -5.96761703e-4f;
  q = q * s + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const float small = q * x + x;
  return select(a > 0.927734375f, large, small);
}

}  // namespace fastlm
