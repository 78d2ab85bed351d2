// Converting between float32 and half precision.
#include "../contract/convert.h"

#include <algorithm>

#include "rows.h"

namespace fastlm {

void to_float32(const Context&, DType dtype, const void* from, int64_t n, float* to) {
  with_dtype(dtype, [&]<class T>() { load_row(static_cast<const T*>(from), n, to); });
}

void from_float32(const Context&, DType dtype, const float* from, int64_t n, void* to) {
  with_dtype(dtype, [&]<class T>() { store_row(from, n, static_cast<T*>(to)); });
}

void fill(const Context&, DType dtype, float value, int64_t n, void* to) {
  with_dtype(dtype, [&]<class T>() { std::fill_n(static_cast<T*>(to), n, from_float<T>(value)); });
}

}  // namespace fastlm
