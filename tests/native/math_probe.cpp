// The inline functions of csrc/cpu over arrays, for tests/test_native.py.
#include "../../csrc/cpu/math.h"
#include "../../csrc/cpu/philox.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace {

template <class F>
void each(const float* in, int64_t n, float* out, const F& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

template <class T>
void widen_each(const uint16_t* in, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastlm::to_float(T{in[i]});
}

template <class T>
void narrow_each(const float* in, int64_t n, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fastlm::from_float<T>(in[i]).bits;
}

}  // namespace

EXPORT void probe_exp(const float* in, int64_t n, float* out) { each(in, n, out, fastlm::exp); }
EXPORT void probe_exp_nonpositive(const float* in, int64_t n, float* out) {
  each(in, n, out, [](float x) { return fastlm::exp_nonpositive(-std::fabs(x)); });
}
EXPORT void probe_tanh(const float* in, int64_t n, float* out) { each(in, n, out, fastlm::tanh); }
EXPORT void probe_erf(const float* in, int64_t n, float* out) { each(in, n, out, fastlm::erf); }

EXPORT void widen_half(const uint16_t* in, int64_t n, float* out) { widen_each<fastlm::Half>(in, n, out); }
EXPORT void widen_bfloat16(const uint16_t* in, int64_t n, float* out) {
  widen_each<fastlm::BFloat16>(in, n, out);
}
EXPORT void narrow_half(const float* in, int64_t n, uint16_t* out) { narrow_each<fastlm::Half>(in, n, out); }
EXPORT void narrow_bfloat16(const float* in, int64_t n, uint16_t* out) {
  narrow_each<fastlm::BFloat16>(in, n, out);
}

// The numbers of counters (first + i, c1, c2, c3), i in [0, 16): 64 words.
EXPORT void probe_philox(uint64_t key, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  fastlm::philox(key, first, c1, c2, c3, out);
}
