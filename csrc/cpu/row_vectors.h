// Walking over a row in vectors of float32, whatever its type and length. A kernel's loop is a function of
// (first column, which columns, which of kSums partial sums): the compiler sees whole vectors and the last
// part of one apart.
#pragma once

#include "vectors.h"

namespace fastlm {

constexpr int kSums = 4;  // vectors of partial sums: in one, each addition waits for the one before

struct Part {  // fewer columns than Whole's kLanes, at the end of a row; the other lanes are 0
  int64_t count;
};

template <class T>
Vector load(const T* p, Whole) {
  return load_vector(p);
}

template <class T>
Vector load(const T* p, Part part) {
  float lanes[kLanes] = {};
  for (int64_t lane = 0; lane < part.count; ++lane) lanes[lane] = to_float(p[lane]);
  return load_vector(lanes);
}

template <class T>
void store(Vector v, T* p, Whole) {
  store_vector(v, p);
}

template <class T>
void store(Vector v, T* p, Part part) {
  for (int64_t lane = 0; lane < part.count; ++lane) p[lane] = from_float<T>(v[lane]);
}

// v with 0 in the lanes past the row's end.
inline Vector only(Whole, Vector v) { return v; }
inline Vector only(Part part, Vector v) {
  for (int64_t lane = part.count; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

// Calls f(j, which, k): columns j and on of a row of n, k the partial sum to add to.
template <class F>
[[gnu::always_inline]] inline void over_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kSums * kLanes <= n; j += kSums * kLanes) {
    f(j, Whole{}, 0);
    f(j + kLanes, Whole{}, 1);
    f(j + 2 * kLanes, Whole{}, 2);
    f(j + 3 * kLanes, Whole{}, 3);
  }
  for (; j + kLanes <= n; j += kLanes) f(j, Whole{}, 0);
  if (j < n) f(j, Part{n - j}, 0);
}

// All lanes of all partial sums, added in pairs.
inline float total(const Vector (&sums)[kSums]) {
  float lanes[kLanes];
  store_vector((sums[0] + sums[1]) + (sums[2] + sums[3]), lanes);
  return add_lanes(lanes);
}

// v as it was rounded: without this the compiler may fuse the multiplication that made it with an addition.
inline Vector rounded(Vector v) { return __builtin_assoc_barrier(v); }

}  // namespace fastlm
