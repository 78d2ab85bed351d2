// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter a call:
// the words of csrc/cpu/philox.h, bit for bit.
#pragma once

#include "../kernels.h"

namespace fastlm {

// The four words of counter (c0, c1, c2, c3): one dropout decision each.
__device__ inline uint4 philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
  }
  return {c0, c1, c2, c3};
}

// One dropout as a kernel's argument.
struct DropoutScale {
  const int64_t* seed = nullptr;  // null: no dropout
  uint32_t threshold = 0;
  float scale = 1;

  explicit DropoutScale(const Dropout& d)
      : seed(d.p > 0 ? d.seed : nullptr),
        threshold(static_cast<uint32_t>(d.p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - d.p))) {}

  __device__ float of(uint32_t word) const { return word >= threshold ? scale : 0.0f; }

  // What to multiply columns col ... col + kWidth - 1 of a row with; col is a multiple of kWidth.
  template <int kWidth>
  __device__ void columns(int64_t row, int64_t col, float (&scales)[kWidth]) const {
    const uint64_t key = static_cast<uint64_t>(*seed);
    const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32);
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const uint4 words = philox(key, static_cast<uint32_t>((col + i) >> 2), low, high, 0);
      if constexpr (kWidth == 1) {
        const int lane = static_cast<int>(col & 3);
        scales[0] = of(lane < 2 ? (lane == 0 ? words.x : words.y) : (lane == 2 ? words.z : words.w));
      } else {
        scales[i] = of(words.x), scales[i + 1] = of(words.y);
        scales[i + 2] = of(words.z), scales[i + 3] = of(words.w);
      }
    }
  }
};

}  // namespace fastlm
