// What the attention kernels share: which keys a query sees, and what happens to a score. Scores are in units
// of log 2, so that their exponential is ex2, one instruction. Query i of a sequence sees its keys j < nk
// with low <= j - i <= high; what no query of a tile sees is skipped, and only where a tile's edge or the
// mask hides something are pairs looked at one by one.
#pragma once

#include "../contract/attention.h"
#include "launch.cuh"
#include "philox.cuh"
#include "tiles.cuh"

namespace fastlm {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kUnlimited = 1 << 30;  // more keys than a sequence has; with a row added still an int

// What a block owns and walks along: `rows` rows, 16 of each of `warps` warps (of `split` warps of the same
// rows each a share of the columns), and `step` rows of the other side at a time, `stages` of them in flight.
struct Tiles {
  int rows, step, warps, split, stages;
  __host__ __device__ constexpr int threads() const { return 32 * warps; }
};

// To 2 ulp: a polynomial, fitted on [0, 0.625], where 1 - 2 / (e^2x + 1) would cancel.
__device__ inline float tanh_of(float x) {
  const float y = x * x;
  const float p =
      -0.3333328068f + y * (0.1333138347f + y * (-0.0537354685f + y * (0.0206267275f - y * 0.0056924275f)));
  const float large = 1 - __fdividef(2.0f, exp2_of(fabsf(x) * (2 * kLog2E)) + 1);
  return fabsf(x) < 0.625f ? x + x * y * p : copysignf(large, x);
}

// One sequence: its first rows in out and dq, and in dk and dv; its queries and keys; what they see.
struct Sequence {
  int64_t first_q, first_k;
  int nq, nk, low, high, shift;  // shift: j - i where alibi is 0

  // Whether a query of i0 ... i1 sees a key of j0 ... j1, at least one of each within the sequence.
  __device__ bool sees(int i0, int i1, int j0, int j1) const {
    return i0 < nq && j0 < nk && j0 - i1 <= high && j1 - i0 >= low;
  }
  // Whether one of these queries does not see one of these keys.
  __device__ bool has_edge(int i0, int i1, int j0, int j1) const {
    return j1 >= nk || j1 - i0 > high || j0 - i1 < low;
  }
};

// Where sequence b starts: the largest of starts[: b + 1], at most `tokens`. The whole warp calls it.
__device__ inline int64_t start_of(const int32_t* starts, int64_t b, int64_t tokens) {
  int found = 0;
  for (int64_t at = threadIdx.x % 32; at <= b; at += 32) found = max(found, starts[at]);
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) found = max(found, __shfl_xor_sync(0xffffffffu, found, lane));
  return min(static_cast<int64_t>(found), tokens);
}

// Where it ends, if it starts at `start`.
__device__ inline int64_t end_of(const int32_t* starts, int64_t b, int64_t start, int64_t tokens) {
  return min(max(static_cast<int64_t>(starts[b + 1]), start), tokens);
}

// A diagonal j - i, or how far from it; what no sequence reaches is as good as the limit.
__device__ inline int bounded(int64_t keys) {
  constexpr int64_t kMost = kUnlimited;
  return static_cast<int>(min(max(keys, -kMost), kMost));
}

__device__ inline Sequence sequence_of(const AttentionInputs& in, int64_t b) {
  Sequence s;
  if (in.q.starts) {
    s.first_q = start_of(in.q.starts, b, in.queries);
    s.first_k = start_of(in.k.starts, b, in.keys);
    s.nq = static_cast<int>(min(end_of(in.q.starts, b, s.first_q, in.queries) - s.first_q, in.longest_q));
    s.nk = static_cast<int>(min(end_of(in.k.starts, b, s.first_k, in.keys) - s.first_k, in.longest_k));
    s.shift = in.bottom_right ? s.nk - s.nq : 0;
  } else {
    s.first_q = b * in.queries, s.first_k = b * in.keys;
    s.nq = static_cast<int>(in.queries);
    s.nk = static_cast<int>(in.keys);
    if (in.kv_lengths) s.nk = max(0, min(s.nk, in.kv_lengths[b]));
    s.shift = bounded(in.offset);
  }
  s.low = in.left < 0 ? -kUnlimited : bounded(int64_t{s.shift} - bounded(in.left));
  s.high = in.right < 0 ? kUnlimited : bounded(int64_t{s.shift} + bounded(in.right));
  return s;
}

// What a block works on: tiles of one head side by side, as they read the same keys and values.
struct Block {
  int tile, head, batch;

  __device__ Block(int tiles, int64_t heads)
      : tile(static_cast<int>(blockIdx.x) % tiles),
        head(static_cast<int>(blockIdx.x) / tiles % static_cast<int>(heads)),
        batch(static_cast<int>(blockIdx.x) / tiles / static_cast<int>(heads)) {}
};

__device__ inline int kv_head_of(const AttentionInputs& in, int h) {
  return h / static_cast<int>(in.heads / in.kv_heads);
}

// Rows [begin, end) of the other side, that one of a tile's rows sees or is seen by.
struct Span {
  int begin, end;
  __device__ int steps(int step) const { return end > begin ? (end - begin + step - 1) / step : 0; }
};

// Of queries first ... first + rows - 1 the keys, from a multiple of `step` on.
__device__ inline Span keys_of(const Sequence& seq, int first, int rows, int step) {
  return {max(0, first + seq.low) / step * step, min(seq.nk, min(first + rows, seq.nq) + seq.high)};
}

// Of keys the queries.
__device__ inline Span queries_of(const Sequence& seq, int first, int rows, int step) {
  const int end = first < seq.nk ? min(seq.nq, min(first + rows, seq.nk) - seq.low) : 0;
  return {max(0, first - seq.high) / step * step, end};
}

// Where the statistics of a sequence's first row are, of [batch, heads, queries] or [heads, tokens].
__device__ inline int64_t first_row(const AttentionInputs& in, const Sequence& s, int64_t b, int64_t h) {
  return in.q.starts ? h * in.queries + s.first_q : (b * in.heads + h) * in.queries;
}

// Row 0 of a sequence whose rows start at `first` if packed.
template <class T>
__device__ Matrix<T> matrix_of(const Heads& t, int64_t b, int64_t head, int64_t first) {
  const T* data = static_cast<const T*>(t.data) + head * t.head;
  return {data + (t.starts ? first * t.seq : b * t.batch), t.seq};
}

// What happens to the scores of one head.
struct Head {
  float factor;         // of q.k, or with a softcap of what tanh takes
  float cap, slope;     // in units of log 2; a cap of 0: none
  const uint8_t* mask;  // null: none; so is bias
  const void* bias;
  uint32_t number;  // b * heads + h
};

__device__ inline int64_t bias_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ inline Head head_of(const AttentionInputs& in, int64_t b, int64_t h) {
  Head head;
  head.factor = in.softcap > 0 ? in.scale / in.softcap : in.scale * kLog2E;
  head.cap = in.softcap * kLog2E;
  head.slope =
      in.alibi_slopes ? in.alibi_slopes[b * in.alibi_strides[0] + h * in.alibi_strides[1]] * kLog2E : 0;
  head.mask = nullptr;
  if (in.mask) {
    head.mask = reinterpret_cast<const uint8_t*>(in.mask) + b * in.mask_strides[0] + h * in.mask_strides[1];
  }
  head.bias = nullptr;
  if (in.bias) {
    head.bias = static_cast<const char*>(in.bias) +
                (b * in.bias_strides[0] + h * in.bias_strides[1]) * bias_bytes(in.bias_dtype);
  }
  head.number = static_cast<uint32_t>(b * in.heads + h);
  return head;
}

__device__ inline float bias_at(const AttentionInputs& in, const void* bias, int i, int j) {
  const int64_t at = i * in.bias_strides[2] + j * in.bias_strides[3];
  if (in.bias_dtype == DType::kFloat32) return static_cast<const float*>(bias)[at];
  if (in.bias_dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(bias)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[at]);
}

// Calls f(n, e, i, j) for each of a thread's pairs: the warp's 16 rows are queries from i0 on or keys from j0
// on, its kCols columns the others.
template <bool kKeysAreRows, int kCols, class F>
__device__ void for_pairs(int i0, int j0, F&& f) {
  for_numbers<kCols>([&](int n, int e, int row, int col) {
    f(n, e, i0 + (kKeysAreRows ? col : row), j0 + (kKeysAreRows ? row : col));
  });
}

// Makes scores of s = q.k; bends: null, or what softcap's derivative multiplies gradients with.
template <bool kKeysAreRows, int kCols>
__device__ void to_scores(const AttentionInputs& in, const Head& head, const Sequence& seq, int i0, int j0,
                          Sums<kCols>& s, Sums<kCols>* bends) {
  for_numbers<kCols>([&](int n, int e, int, int) {
    s[n][e] *= head.factor;
    if (bends) (*bends)[n][e] = 1;
  });
  if (head.cap > 0) {
    for_numbers<kCols>([&](int n, int e, int, int) {
      const float bent = tanh_of(s[n][e]);
      s[n][e] = bent * head.cap;
      if (bends) (*bends)[n][e] = 1 - bent * bent;
    });
  }
  if (head.slope != 0) {
    for_pairs<kKeysAreRows, kCols>(i0, j0, [&](int n, int e, int i, int j) {
      s[n][e] -= head.slope * fabsf(static_cast<float>(i + seq.shift - j));
    });
  }
  if (head.bias) {
    for_pairs<kKeysAreRows, kCols>(i0, j0, [&](int n, int e, int i, int j) {
      const float bias = i < seq.nq && j < seq.nk ? bias_at(in, head.bias, i, j) : 0.0f;
      s[n][e] = bias == -INFINITY ? -INFINITY : s[n][e] + bias * kLog2E;
    });
  }
}

// Replaces with `fill` what queries do not see.
template <bool kKeysAreRows, bool kMasked, int kCols>
__device__ void hide(const AttentionInputs& in, const Head& head, const Sequence& seq, int i0, int j0,
                     float fill, Sums<kCols>& x) {
  if (kMasked && head.mask) {
    for_pairs<kKeysAreRows, kCols>(i0, j0, [&](int n, int e, int i, int j) {
      const bool inside = i < seq.nq && j < seq.nk;
      if (!inside || !head.mask[i * in.mask_strides[2] + j * in.mask_strides[3]]) x[n][e] = fill;
    });
  }
  constexpr int kQueries = kKeysAreRows ? kCols : 16, kKeys = kKeysAreRows ? 16 : kCols;
  if (!seq.has_edge(i0, i0 + kQueries - 1, j0, j0 + kKeys - 1)) return;
  for_pairs<kKeysAreRows, kCols>(i0, j0, [&](int n, int e, int i, int j) {
    if (j >= seq.nk || j - i < seq.low || j - i > seq.high) x[n][e] = fill;
  });
}

__device__ inline uint32_t kept_words(const DropoutScale& dropout, uint64_t key, int j, int i,
                                      uint32_t head) {
  const uint4 words = philox(key, static_cast<uint32_t>(j) >> 2, static_cast<uint32_t>(i), head, 0);
  return (words.x >= dropout.threshold ? 1u : 0u) | (words.y >= dropout.threshold ? 2u : 0u) |
         (words.z >= dropout.threshold ? 4u : 0u) | (words.w >= dropout.threshold ? 8u : 0u);
}

// Whether dropout keeps a thread's pairs: bit 4 n + e. The four words of a counter are of four keys, which
// two lanes have of a row, or four lanes of a column: each computes one counter of 4 pairs, and they exchange
// the bits. j0 is a multiple of 16.
template <bool kKeysAreRows, int kCols>
__device__ uint32_t survivors(const DropoutScale& dropout, uint32_t head, int i0, int j0) {
  static_assert(kCols <= 64, "a bit for each pair");
  const uint64_t key = static_cast<uint64_t>(*dropout.seed);
  const int row = lane_row(), col = lane_col();
  uint32_t kept = 0;
#pragma unroll 2  // two counters at a time hide the latency of each other's products
  for (int n = 0; n < kCols / 8; ++n) {
    if constexpr (kKeysAreRows) {  // counter `part` is of query col + part % 2 and key row + 8 * (part / 2)
      const int part = row % 4, i = i0 + 8 * n + col + part % 2, j = j0 + row / 4 * 4 + 8 * (part / 2);
      uint32_t all = kept_words(dropout, key, j, i, head) << 4 * part;
      all |= __shfl_xor_sync(0xffffffffu, all, 4);
      all |= __shfl_xor_sync(0xffffffffu, all, 8);
#pragma unroll
      for (int e = 0; e < 4; ++e) kept |= (all >> (4 * e + part) & 1) << (4 * n + e);
    } else {  // the even lane's counter is of the upper row, the odd one's of the lower
      const int odd = col / 2 % 2, i = i0 + row + 8 * odd, j = j0 + 8 * n + col / 4 * 4;
      const uint32_t own = kept_words(dropout, key, j, i, head);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
      const uint32_t pairs = odd ? (other >> 2) | (own >> 2) << 2 : (own & 3) | (other & 3) << 2;
      kept |= pairs << 4 * n;
    }
  }
  return kept;
}

// x where `kept` has its bit, times scale; else 0.
template <int kCols>
__device__ void drop(Sums<kCols>& x, uint32_t kept, float scale) {
  for_numbers<kCols>(
      [&](int n, int e, int, int) { x[n][e] = kept >> (4 * n + e) & 1 ? x[n][e] * scale : 0.0f; });
}

// Whether a call's scores are more than scale * q.k, or what the quick way takes for granted does not hold.
inline bool has_extras(const AttentionInputs& in) {
  return in.mask || in.bias || in.alibi_slopes || in.softcap > 0 || in.dropout.p > 0 || !(in.scale > 0);
}

// Calls f.operator()<T, kDim, kExtras>(): float32 has one way for all, as what it computes bounds it.
template <class F>
void with_attention(const AttentionInputs& in, F&& f) {
  with_device_dtype(in.dtype, [&]<class T>() {
    with_int<32, 64, 96, 128, 256>(static_cast<int>(in.dim), [&]<int kDim>() {
      if constexpr (sizeof(T) == 4) {
        f.template operator()<T, kDim, true>();
      } else {
        with_bool(has_extras(in), [&]<bool kExtras>() { f.template operator()<T, kDim, kExtras>(); });
      }
    });
  });
}

__host__ __device__ inline int64_t blocks_of(int64_t rows, int64_t each) { return (rows + each - 1) / each; }

// Blocks along a sequence: at least one if packed, for the rows that are of no sequence.
__host__ __device__ inline int64_t blocks_along(const Heads& t, int64_t rows, int64_t longest, int64_t each) {
  return t.starts ? blocks_of(longest > 1 ? longest : 1, each) : blocks_of(rows, each);
}

// Calls f(row) for the rows that this thread has to write of those of no sequence: sequence b sees to what
// follows it, the first also to what is before. first, count: its own rows.
template <class F>
__device__ void for_gaps(const int32_t* starts, int64_t b, int64_t batch, int64_t first, int64_t count,
                         int64_t tokens, F&& f) {
  const int64_t begin = b == 0 ? 0 : first;
  const int64_t end = b == batch - 1 ? tokens : end_of(starts, b, first, tokens);
  for (int64_t row = begin; row < end - count; ++row) f(row < first ? row : row + count);
}

}  // namespace fastlm
