// Results written past the caches, where they would not be found again: a plain store reads its cache line
// from memory first, which makes three transfers out of a copy's two. Measured on 48 MB: 1.33 times the copy
// rate; on 12 MB, beside a cache of 32 MB, nothing.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_vectors.h"

namespace fastlm {

// Larger outputs are written past the caches: a third-level cache has a few MB for each core, so that the
// next op would find little of them there. A constant, for what sysconf says of a virtual machine's cache may
// be ten times too much.
constexpr int64_t kStreamedBytes = 8 << 20;

// Whether an output of `bytes` is: it is large, and pieces of `piece` bytes from `begin` on are whole lines.
inline bool streams(const void* begin, int64_t bytes, int64_t piece) {
  constexpr int64_t kLineBytes = 64;
  const bool whole = piece % kLineBytes == 0 && reinterpret_cast<uintptr_t>(begin) % kLineBytes == 0;
  return bytes > kStreamedBytes && whole;
}

// The same of `result`, rows of a kernel's arguments.
template <class T, class Args>
bool streams_rows(const Args& a, const void* result) {
  const int64_t row_bytes = a.cols * static_cast<int64_t>(sizeof(T));
  return streams(result, a.rows * row_bytes, row_bytes);
}

// Stores of whole vectors to aligned places, around the caches.
#if defined(__AVX512F__)
inline void stream_vector(Vector v, float* p) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
#elif defined(__AVX2__)
inline void stream_vector(Vector v, float* p) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
#elif defined(__SSE2__)
inline void stream_vector(Vector v, float* p) { _mm_stream_ps(p, reinterpret_cast<__m128>(v)); }
#else
inline void stream_vector(Vector v, float* p) { store_vector(v, p); }
#endif

#if defined(__SSE2__)
inline void stream_piece(__m128i v, __m128i* p) { _mm_stream_si128(p, v); }
#endif
#if defined(__AVX2__)
inline void stream_piece(__m256i v, __m256i* p) { _mm256_stream_si256(p, v); }
#endif

// Half precision: bytes from one aligned place to another, around the caches, a Piece at a time.
template <class Piece, size_t kBytes>
void stream_pieces(const void* from, void* to) {
  for (size_t i = 0; i < kBytes / sizeof(Piece); ++i) {
    stream_piece(static_cast<const Piece*>(from)[i], static_cast<Piece*>(to) + i);
  }
}

template <size_t kBytes>
void stream_bytes(const void* from, void* to) {
#if defined(__AVX2__)
  if constexpr (kBytes % sizeof(__m256i) == 0) return stream_pieces<__m256i, kBytes>(from, to);
#endif
#if defined(__SSE2__)
  if constexpr (kBytes % sizeof(__m128i) == 0) return stream_pieces<__m128i, kBytes>(from, to);
#endif
  std::memcpy(to, from, kBytes);
}

template <class T>
void stream_vector(Vector v, T* p) {
  alignas(64) T words[kLanes];
  store_vector(v, words);
  stream_bytes<sizeof(words)>(words, p);
}

FASTLM_INLINE void stream_two(const Two& x, float* p) {
  stream_vector(x.v[0], p);
  stream_vector(x.v[1], p + kLanes);
}
template <class T>
FASTLM_INLINE void stream_two(const Two& x, T* p) {
  alignas(64) T words[kTwoNumbers];
  store_two(x, words);
  stream_bytes<sizeof(words)>(words, p);
}

// A kernel's result: `stream` is what streams() said of the output.
template <class T>
FASTLM_INLINE void store_result(const Two& v, T* p, Block which, bool stream) {
  if (stream) return stream_two(v, p);
  store(v, p, which);
}

template <class T>
FASTLM_INLINE void store_result(Vector v, T* p, Whole which, bool stream) {
  if (stream) return stream_vector(v, p);
  store(v, p, which);
}

template <class T>
FASTLM_INLINE void store_result(Vector v, T* p, Part which, bool) {
  store(v, p, which);
}

// Asks for n elements to be in the second-level cache soon.
template <class T>
void prefetch_row(const T* row, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace fastlm
