// Walking over a row in vectors of float32, whatever its type and length. A kernel's loop is a function of
// (first column, which columns, which of two partial sums) whose `auto` values are Two vectors in most of the
// row, and a Vector in what is left of it.
#pragma once

#include <algorithm>

#include "packed.h"

namespace fastlm {

struct Block {};  // two vectors
struct Part {     // fewer columns than Whole's kLanes, at the end of a row; the other lanes are 0
  int64_t count;
};

template <class T>
FASTLM_INLINE Two load(const T* p, Block) {
  return load_two(p);
}

template <class T>
FASTLM_INLINE Vector load(const T* p, Whole) {
  return load_vector(p);
}

template <class T>
FASTLM_INLINE Vector load(const T* p, Part part) {
  T numbers[kLanes] = {};
  std::copy_n(p, part.count, numbers);
  return load_vector(numbers);
}

template <class T>
FASTLM_INLINE void store(const Two& v, T* p, Block) {
  store_two(v, p);
}

template <class T>
FASTLM_INLINE void store(Vector v, T* p, Whole) {
  store_vector(v, p);
}

template <class T>
FASTLM_INLINE void store(Vector v, T* p, Part part) {
  T numbers[kLanes];
  store_vector(v, numbers);
  std::copy_n(numbers, part.count, p);
}

inline Two zero(Block) { return {}; }
inline Vector zero(Whole) { return Vector{}; }
inline Vector zero(Part) { return Vector{}; }

// v with 0 in the lanes past the row's end.
inline Two only(Block, const Two& v) { return v; }
inline Vector only(Whole, Vector v) { return v; }
inline Vector only(Part part, Vector v) {
  for (int64_t lane = part.count; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

// Calls f(j, which, k): columns j and on of a row of n, k in {0, 1} the partial sum to add to.
template <class F>
FASTLM_INLINE void over_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 2 * kTwoNumbers <= n; j += 2 * kTwoNumbers) {
    f(j, Block{}, 0);
    f(j + kTwoNumbers, Block{}, 1);
  }
  if (j + kTwoNumbers <= n) f(j, Block{}, 0), j += kTwoNumbers;
  if (j + kLanes <= n) f(j, Whole{}, 0), j += kLanes;
  if (j < n) f(j, Part{n - j}, 0);
}

// Partial sums, four vectors of them: in one, each addition waits for the one before.
class Sums {
 public:
  FASTLM_INLINE void add(const Two& v, int k) { sums_[k] = sums_[k] + v; }
  FASTLM_INLINE void add(Vector v, int k) { sums_[k].v[0] += v; }

  // All lanes of all of them, added in pairs.
  float total() const {
    const Two both = sums_[0] + sums_[1];
    float lanes[kLanes];
    store_vector(both.v[0] + both.v[1], lanes);
    return add_lanes(lanes);
  }

 private:
  Two sums_[2] = {};
};

}  // namespace fastlm
