// decode_attention's kernel: out = softmax(scale * q k^T, capped, + alibi, over the keys that a query may
// attend to) v; csrc/contract/decode_attention.h has the rest.
//
// Row r of a kv head is query r % queries of the r / queries-th of the query heads that share it. A block
// takes up to 64 rows of one kv head and one part of its keys: a tile of 16 rows a warp, and where there are
// fewer rows than warps, the warps of a tile take the keys in turns, 16 at a time. So a key and a value are
// read from memory once for all rows of a block.
//
// Keys and values come through rings in shared memory (decode_ring.cuh), copies of later steps under way
// while one is used. A sum over dims or keys may be taken in any order, so each thread takes 16 bytes of a
// row from there and these are, as they are (keys) or after exchanging halves between the rows that it has
// taken itself (values), its part of an mma operand. Of 256-byte rows (128 dims of half precision) a warp has
// 12 KB under way whenever it waits, a block 48 KB; an H200 needs some 30 KB a multiprocessor (3.8 TB/s and
// 1 us for 132 of them).
//
// How many parts there are follows from shapes, how long they are from a sequence's length, on the device: so
// a CUDA graph can be replayed with other lengths, and the bits do not depend on the cache's capacity. A
// second kernel merges the parts in their order. Bound by bytes: the keys and values in reach, read once.
//
// Numbers are multiplied as fragments.cuh says, sums and softmax are float32. Values of int8 are multiplied
// with weights p * scale, which may be too small for a half: each row has a power of two as its unit for
// them. Sources: Dao et al., "Flash-Decoding", https://pytorch.org/blog/flash-decoding; Milakov, Gimelshein,
// https://arxiv.org/abs/1805.02867; Kwon et al., "PagedAttention", https://arxiv.org/abs/2309.06180.
#pragma once

#include <algorithm>

#include "decode_ring.cuh"
#include "launch.cuh"

namespace fastlm {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 16;  // of a warp, as mma has them
// Keys of a part: two steps of each warp, or its start is most of its work.
constexpr int64_t kLeastShare = 128;

// How the work is cut, by shapes alone.
struct Cut {
  int64_t rows;           // of a kv head
  int tiles, row_blocks;  // tiles of kRows in a block: 1, 2 or 4; blocks of them
  int shares, parts;      // parts that a long sequence has; those that the cache has room for
};

struct Decode {
  DecodeAttention a;
  Cut cut;
};

// The keys [first, end) that a sequence's queries reach, and how many of them a part takes.
struct Reach {
  uint32_t first, end, share;
  __device__ uint32_t used() const { return (end - first + share - 1) / share; }
};

__device__ inline Reach reach_of(const DecodeAttention& a, int64_t batch, int shares) {
  const int64_t end = max(int64_t{0}, min(int64_t{a.pages.lengths[batch]}, capacity_of(a.pages)));
  const int64_t first = a.left < 0 || a.left >= end - a.queries ? 0 : end - a.queries - a.left;
  constexpr uint32_t kStep = kWarps * kKeys;
  const uint32_t keys = static_cast<uint32_t>(end - first);
  const uint32_t share = ((keys + shares - 1) / shares + kStep - 1) / kStep * kStep;
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(end),
          max(share, static_cast<uint32_t>(kLeastShare))};
}

// Row r of a kv head; some row where there is none.
struct QueryRow {
  int64_t head, query;
  bool exists;
};

__device__ inline QueryRow row_of(const Decode& d, int64_t kv_head, int64_t r) {
  const uint32_t queries = static_cast<uint32_t>(d.a.queries);
  const uint32_t at = static_cast<uint32_t>(min(r, d.cut.rows - 1));
  return {kv_head * (d.a.heads / d.a.kv_heads) + at / queries, at % queries, r < d.cut.rows};
}

// The keys [low, high) of a part that a row attends to, which key it is aligned with, its slope.
struct Range {
  uint32_t low, high;
  int own;
  float slope;
};

__device__ inline Range range_of(const DecodeAttention& a, int64_t batch, const QueryRow& row,
                                 uint32_t length, uint32_t end) {
  const int64_t own = row.query + length - a.queries;
  return {.low = a.left < 0 || a.left >= own ? 0 : static_cast<uint32_t>(own - a.left),
          .high = static_cast<uint32_t>(max(int64_t{0}, min(own + 1, int64_t{end}))),
          .own = static_cast<int>(own),
          .slope = a.alibi_slopes ? a.alibi_slopes[batch * a.alibi_batch + row.head * a.alibi_head] : 0};
}

// exp(x) of a score less the largest: the product is rounded, by nothing for x = 0 and by little for the keys
// that weigh most.
__device__ inline float exponential(float x) { return exp2f(x * kLog2E); }

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// What warps tell each other of their rows.
struct OfWarps {
  float tops[kWarps][kRows], totals[kWarps][kRows];
};

// What a thread holds. In shared memory: OfWarps, then queries as mma operands, uint4 [kQParts][tiles]
// [kFragments][lane], then rings, one for each turn; in their place, when they are not needed any more, the
// sums of warps that share a tile, float4 [tiles][kSums][lane].
template <class Q, class C, int kDim, bool kIsWide>
struct Shape {
  using T = typename Operand<Q>::Type;
  using Keys = Ring<C, kDim, kIsWide>;
  static constexpr int kQParts = Operand<Q>::kParts, kCacheParts = Operand<C>::kParts;
  // Numbers that a thread takes at a time: a quad takes a key, eight lanes take a value.
  static constexpr int kKeyWidth = std::min(kWide<C>, kDim / 4), kValueWidth = std::min(kWide<C>, kDim / 8);
  static constexpr int kKeyChunks = kDim / (4 * kKeyWidth), kValueChunks = kDim / (8 * kValueWidth);
  // Blocks: as shared memory has room for in an H100, or fewer so that registers do not spill.
  static constexpr int kResident = kQParts > 1 || kDim > 128 ? 2 : 3;
  static constexpr int kFragments = kDim / 16, kSums = kDim / 8;

  static size_t shared(const Cut& cut) {
    const size_t queries = sizeof(uint4) * 32 * kQParts * kFragments * cut.tiles;
    return sizeof(OfWarps) + queries + kWarps / cut.tiles * Keys::bytes_of(cut.tiles);
  }
};

// A block's queries into shared memory.
template <class Q, class C, int kDim, bool kIsWide>
__device__ void load_queries(const Decode& d, int64_t batch, int64_t kv_head, int64_t first, uint4* queries) {
  using S = Shape<Q, C, kDim, kIsWide>;
  const DecodeAttention& a = d.a;
  const int lane = threadIdx.x % 32, each = d.cut.tiles * S::kFragments;
  for (int i = threadIdx.x / 32; i < each; i += kWarps) {
    const int fragment = i % S::kFragments, tile = i / S::kFragments;
    constexpr int kOfChunk = S::kKeyWidth / 4;
    const int col = (fragment / kOfChunk * 4 + lane % 4) * S::kKeyWidth + fragment % kOfChunk * 4;
    uint32_t words[4][S::kQParts];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first + tile * kRows + half * 8 + lane / 4;
      const QueryRow row = row_of(d, kv_head, r);
      const Q* q =
          static_cast<const Q*>(a.q) + batch * a.q_batch + row.head * a.q_head + row.query * a.q_query;
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = row.exists && col + k < a.dim ? as_float(q[col + k]) : 0;
      split<typename S::T>(x[0], x[1], words[half]);
      split<typename S::T>(x[2], x[3], words[half + 2]);
    }
#pragma unroll
    for (int p = 0; p < S::kQParts; ++p) {
      queries[(p * each + i) * 32 + lane] = {words[0][p], words[1][p], words[2][p], words[3][p]};
    }
  }
}

// One warp on its way along its keys.
template <class Q, class C, int kDim, bool kIsWide>
struct Walk {
  using S = Shape<Q, C, kDim, kIsWide>;
  using T = typename S::T;
  static constexpr bool kScaled = std::is_same_v<C, int8_t>;

  const Decode& d;
  int64_t batch, kv_head;
  uint32_t end;
  const uint4* queries;             // of this warp's tile
  typename S::Keys ring;            // of its turn
  typename S::Keys::Found next;     // the step whose keys were asked for last
  Range ranges[2];                  // of the rows lane / 4 and lane / 4 + 8 of its tile
  float top[2], total[2], unit[2];  // total: this thread's share; unit: of sums, 1 but where kScaled
  float sums[S::kSums][4];

  __device__ uint32_t each() const { return kWarps / d.cut.tiles * kKeys; }  // keys of a block's step

  // Starts to copy this warp's first keys and values, from `start` on, as many as the ring takes.
  __device__ void ask(uint32_t start) {
    for (int slot = 0; slot < ring.steps(); ++slot) {
      next = ring.find(start + slot * each());
      ring.template copy<false>(next, slot);
      if (slot + 1 < ring.steps()) ring.template copy<true>(next, slot);
    }
  }

  // Along the keys from `start` on, a step of all warps at a time, of which this warp's are `turn` on. All
  // take as many steps: those of a ring wait for each other.
  __device__ void along(uint32_t start, uint32_t turn) {
#pragma unroll
    for (int i = 0; i < 2; ++i) top[i] = -INFINITY, total[i] = 0, unit[i] = kScaled ? 0 : 1;
    set_zero<kDim>(sums);
    const int steps = ring.steps();
    for (int slot = 0; start < end; start += each(), slot = (slot + 1) & (steps - 1)) {
      step(start + turn, slot, start + turn + steps * each());
    }
    wait_for_copies<0>();  // nothing may land in what takes the rings' place
  }

  // Values are copied a step later than keys: then their slot is free after a wait that is needed anyway.
  __device__ void step(uint32_t start, int slot, uint32_t ahead) {
    ring.wait();  // keys have landed, and the values before are used
    ring.template copy<true>(next, (slot - 1) & (ring.steps() - 1));
    next = ring.find(ahead);
    float s[2][4] = {};
    if (start < end) add_scores(slot, s);
    ring.wait();  // values have landed, and the keys are used
    ring.template copy<false>(next, slot);
    if (start >= end) return;
    uint4 weights[S::kQParts];
    mask(start, s);
    softmax(slot, s);
    pack(s, weights);
    add_values(slot, weights);
  }

  // s[n][c] += q . k: rows lane / 4 (c < 2) and lane / 4 + 8, key 8 n + lane % 4 * 2 + c % 2.
  __device__ void add_scores(int slot, float (&s)[2][4]) const {
    const int lane = threadIdx.x % 32;
    const char* keys = ring.tile(slot, false);
#pragma unroll
    for (int c = 0; c < S::kKeyChunks; ++c) {
      Words<C, S::kKeyWidth> words[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        ring.take(keys, 8 * n + lane / 4, (c * 4 + lane % 4) * S::kKeyWidth, words[n]);
      }
      multiply_keys(words, c, s);
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float scale = scale_of(slot, k, false);
        s[k / 2][k % 2] *= scale, s[k / 2][k % 2 + 2] *= scale;
      }
    }
  }

  // Of the k-th of the keys or values that a thread has in s.
  __device__ float scale_of(int slot, int k, bool value) const {
    return ring.scales(slot, value)[k / 2 * 8 + threadIdx.x % 4 * 2 + k % 2];
  }

  __device__ void multiply_keys(const Words<C, S::kKeyWidth> (&words)[2], int chunk, float (&s)[2][4]) const {
    const int each = d.cut.tiles * S::kFragments * 32;
#pragma unroll
    for (int m = 0; m < S::kKeyWidth / 4; ++m) {
      uint4 q[S::kQParts];
#pragma unroll
      for (int p = 0; p < S::kQParts; ++p) {
        q[p] = queries[p * each + (chunk * (S::kKeyWidth / 4) + m) * 32 + threadIdx.x % 32];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b0[S::kCacheParts], b1[S::kCacheParts];
        pair<T>(words[n], 4 * m, words[n], 4 * m + 1, b0);
        pair<T>(words[n], 4 * m + 2, words[n], 4 * m + 3, b1);
        multiply_add<T>(s[n], q, b0, b1);
      }
    }
  }

  // s becomes scores, -inf where a row does not attend. No branches by key: a warp would take them in turns.
  __device__ void mask(uint32_t start, float (&s)[2][4]) const {
    const DecodeAttention& a = d.a;
    for_numbers<2 * 8>([&](int n, int e, int, int) { s[n][e] *= a.scale; });
    if (a.softcap > 0) {
      for_numbers<2 * 8>([&](int n, int e, int, int) { s[n][e] = a.softcap * tanhf(s[n][e] / a.softcap); });
    }
    if (a.alibi_slopes) {
      for_numbers<2 * 8>([&](int n, int e, int, int col) {
        const Range& range = ranges[e / 2];
        s[n][e] -= range.slope * static_cast<float>(range.own - static_cast<int>(start + col));
      });
    }
    for_numbers<2 * 8>([&](int n, int e, int, int col) {
      const Range& range = ranges[e / 2];
      const bool attends = (start + col >= range.low) & (start + col < range.high);
      s[n][e] = attends ? s[n][e] : -INFINITY;
    });
  }

  // s becomes exp(s - top), times the value's scale in units of the row's.
  __device__ void softmax(int slot, float (&s)[2][4]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float p[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) p[k] = s[k / 2][k % 2 + 2 * i];
      const float before = top[i];
      top[i] = fmaxf(before, quad_max(fmaxf(fmaxf(p[0], p[1]), fmaxf(p[2], p[3]))));
      const float shift = shift_of(top[i]);
      factor[i] = exponential(before - shift);
#pragma unroll
      for (float& v : p) v = exponential(v - shift);
      total[i] = total[i] * factor[i] + ((p[0] + p[1]) + (p[2] + p[3]));
      if constexpr (kScaled) {
        float scale[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) scale[k] = scale_of(slot, k, true);
        factor[i] = weigh(p, scale, factor[i], unit[i]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) s[k / 2][k % 2 + 2 * i] = p[k];
    }
    if (__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) shrink(factor);
  }

  // p becomes p * scale in a new unit, a power of two so that nothing is rounded: the largest is in [1, 2) of
  // it, or smaller if weights before were larger. Returns what sums are to be multiplied with.
  __device__ static float weigh(float (&p)[4], const float (&scales)[4], float factor, float& unit) {
#pragma unroll
    for (int k = 0; k < 4; ++k) p[k] *= scales[k];
    const float before = unit * factor, first = fmaxf(fabsf(p[0]), fabsf(p[1]));
    const float highest = fmaxf(before, quad_max(fmaxf(first, fmaxf(fabsf(p[2]), fabsf(p[3])))));
    const uint32_t exponent = max(1u, min(253u, __float_as_uint(highest) >> 23));
    const float inverse = __uint_as_float((254 - exponent) << 23);
    unit = __uint_as_float(exponent << 23);
#pragma unroll
    for (float& v : p) v *= inverse;
    return before * inverse;
  }

  __device__ void shrink(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < S::kSums; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[n][c] *= factor[c / 2];
    }
  }

  __device__ static void pack(const float (&p)[2][4], uint4 (&weights)[S::kQParts]) {
    uint32_t words[4][S::kQParts];
#pragma unroll
    for (int i = 0; i < 4; ++i) split<T>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1], words[i]);
#pragma unroll
    for (int i = 0; i < S::kQParts; ++i) {
      weights[i] = {words[0][i], words[1][i], words[2][i], words[3][i]};
    }
  }

  // sums[n] += weights values, column lane % 4 * 2 + c % 2 of the n-th mma being value
  // (n / kValueWidth * 8 + that) * kValueWidth + n % kValueWidth.
  __device__ void add_values(int slot, const uint4 (&weights)[S::kQParts]) {
    const int lane = threadIdx.x % 32;
    const char* values = ring.tile(slot, true);
#pragma unroll
    for (int c = 0; c < S::kValueChunks; ++c) {
      Words<C, S::kValueWidth> words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ring.take(values, k / 2 * 8 + lane % 4 * 2 + k % 2, (c * 8 + lane / 4) * S::kValueWidth, words[k]);
      }
#pragma unroll
      for (int i = 0; i < S::kValueWidth; ++i) {
        uint32_t b0[S::kCacheParts], b1[S::kCacheParts];
        pair<T>(words[0], i, words[1], i, b0);
        pair<T>(words[2], i, words[3], i, b1);
        multiply_add<T>(sums[c * S::kValueWidth + i], weights, b0, b1);
      }
    }
  }

  // The sums of the `warps` warps of a tile, added in their order; the last of them, which has them then,
  // returns true. The whole block calls it.
  __device__ bool gather(int warp, int warps, int tile, OfWarps& of_warps, float4* shared) {
    auto &tops = of_warps.tops, &totals = of_warps.totals;
    const int lane = threadIdx.x % 32, self = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = quad_sum(total[i]);
    if (warps == 1) return shrink(unit), true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane % 4 == 0) tops[self][i * 8 + lane / 4] = top[i], totals[self][i * 8 + lane / 4] = total[i];
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = i * 8 + lane / 4, step = kWarps / warps;  // a tile's warps are so far apart
      float highest = -INFINITY, sum = 0;
      for (int w = tile; w < kWarps; w += step) highest = fmaxf(highest, tops[w][row]);
      const float shift = shift_of(highest);
      for (int w = tile; w < kWarps; w += step) sum += totals[w][row] * exponential(tops[w][row] - shift);
      factor[i] = unit[i] * exponential(top[i] - shift);
      top[i] = highest, total[i] = sum;
    }
    shrink(factor);
    for (int w = 0; w < warps; ++w) {
      if (w == warp) pass_on(w > 0, w + 1 < warps, shared);
      __syncthreads();
    }
    return warp + 1 == warps;
  }

  __device__ void pass_on(bool takes, bool gives, float4* shared) {
#pragma unroll
    for (int n = 0; n < S::kSums; ++n) {
      float4& place = shared[n * 32 + threadIdx.x % 32];
      float (&sum)[4] = sums[n];
      if (takes) {
        const float4 before = place;
        sum[0] += before.x, sum[1] += before.y, sum[2] += before.z, sum[3] += before.w;
      }
      if (gives) place = {sum[0], sum[1], sum[2], sum[3]};
    }
  }

  __device__ void store_rows(int64_t first, int part) const {
    const DecodeAttention& a = d.a;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const QueryRow row = row_of(d, kv_head, first + i * 8 + threadIdx.x % 32 / 4);
      if (!row.exists) continue;
      const float inverse = total[i] == 0 ? 0 : 1 / total[i];
      const float lse = total[i] == 0 ? -INFINITY : top[i] + logf(total[i]);
      const int64_t index = (batch * a.heads + row.head) * a.queries + row.query;
      if (d.cut.parts == 1) {
        const int64_t at = (batch * a.queries + row.query) * a.heads + row.head;
        store_row(i, inverse, static_cast<Q*>(a.out) + at * a.value_dim);
        if (threadIdx.x % 4 == 0) a.lse[index] = lse;
      } else {
        const int64_t at = index * d.cut.parts + part;
        store_row(i, inverse, a.scratch + at * a.value_dim);
        float* lses = a.scratch + a.batch * a.heads * a.queries * d.cut.parts * a.value_dim;
        if (threadIdx.x % 4 == 0) lses[at] = lse;
      }
    }
  }

  template <class Out>
  __device__ void store_row(int i, float inverse, Out* to) const {
#pragma unroll
    for (int c = 0; c < 2 * S::kValueChunks; ++c) {
      constexpr int kWidth = S::kValueWidth;
      const int col = (c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2) * kWidth;
      float values[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = sums[c / 2 * kWidth + k][2 * i + c % 2] * inverse;
      if constexpr (kIsWide && kWidth % kWide<Out> == 0) {
        if (col < d.a.value_dim) store<kWidth>(values, to + col);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (col + k < d.a.value_dim) to[col + k] = rounded_to<Out>(values[k]);
        }
      }
    }
  }
};

// What a block works on.
struct Part {
  int64_t batch, kv_head;
  uint32_t row_block, part;

  __device__ explicit Part(const Decode& d) {
    const uint32_t kv_heads = static_cast<uint32_t>(d.a.kv_heads);
    row_block = blockIdx.x % d.cut.row_blocks;
    part = blockIdx.x / d.cut.row_blocks % d.cut.parts;
    const uint32_t index = blockIdx.x / d.cut.row_blocks / d.cut.parts;
    batch = index / kv_heads, kv_head = index % kv_heads;
  }
};

template <class Q, class C, int kDim, bool kIsWide>
__global__ void __launch_bounds__(kThreads, Shape<Q, C, kDim, kIsWide>::kResident)
    decode_attention_kernel(const Decode d) {
  using S = Shape<Q, C, kDim, kIsWide>;
  extern __shared__ uint4 shared[];
  uint4* const queries = shared + sizeof(OfWarps) / sizeof(uint4);
  const Cut& cut = d.cut;
  const auto [batch, kv_head, row_block, part] = Part(d);
  const Reach reach = reach_of(d.a, batch, cut.shares);
  const uint32_t begin = reach.first + part * reach.share, end = min(begin + reach.share, reach.end);
  if (cut.parts > 1 && begin >= end) return;

  const int lane = threadIdx.x % 32, self = threadIdx.x / 32;
  const int tile = self % cut.tiles, warp = self / cut.tiles, warps = kWarps / cut.tiles;
  const int64_t block = static_cast<int64_t>(row_block) * cut.tiles * kRows, first = block + tile * kRows;
  char* const rings = reinterpret_cast<char*>(queries + S::kQParts * cut.tiles * S::kFragments * 32);
  char* const ring = rings + warp * S::Keys::bytes_of(cut.tiles);
  Walk<Q, C, kDim, kIsWide> walk = {d,
                                    batch,
                                    kv_head,
                                    end,
                                    queries + tile * S::kFragments * 32,
                                    {d.a, batch, kv_head, end, cut.tiles, tile, ring}};
  if (begin < end) walk.ask(begin + warp * kKeys);  // before anything else is waited for
  load_queries<Q, C, kDim, kIsWide>(d, batch, kv_head, block, queries);
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    const QueryRow row = row_of(d, kv_head, first + i * 8 + lane / 4);
    walk.ranges[i] = range_of(d.a, batch, row, reach.end, end);
  }
  walk.along(begin, warp * kKeys);
  float4* const sums = reinterpret_cast<float4*>(rings) + tile * S::kSums * 32;
  OfWarps& of_warps = *reinterpret_cast<OfWarps*>(shared);
  if (walk.gather(warp, warps, tile, of_warps, sums)) walk.store_rows(first, part);
}

template <class C>
bool wide_cache(const void* cache, const CacheStrides& at, int64_t dim) {
  return wide_rows<C>(dim, {{cache, at.page}, {cache, at.head}, {cache, at.slot}});
}

// Calls f.operator()<kDim, kIsWide>() for the narrowest kernel that takes these heads. float32 stops at 128
// dims: three parts of each number and 256 sums do not fit into registers.
template <class Q, class C, class F>
void with_shape(const DecodeAttention& a, F&& f) {
  constexpr int kWidest = std::is_same_v<Q, float> ? 128 : 256;
  const int64_t widest = std::max(a.dim, a.value_dim);
  if (wide_cache<C>(a.k, a.k_at, a.dim) && wide_cache<C>(a.v, a.v_at, a.value_dim)) {
    const int dim = widest <= 32 ? 32 : widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
    with_int<32, 64, 128, kWidest>(dim, [&]<int kDim>() { f.template operator()<kDim, true>(); });
  } else {
    with_int<64, kWidest>(widest <= 64 ? 64 : kWidest,
                          [&]<int kDim>() { f.template operator()<kDim, false>(); });
  }
}

// Launches the kernel for a cache of C.
template <class Q, class C>
void decode_parts(const Context& context, const Decode& d) {
  const DecodeAttention& a = d.a;
  const int64_t blocks = a.batch * a.kv_heads * d.cut.parts * d.cut.row_blocks;
  with_shape<Q, C>(a, [&]<int kDim, bool kIsWide>() {
    launch("decode_attention", context, decode_attention_kernel<Q, C, kDim, kIsWide>, blocks, kThreads,
           Shape<Q, C, kDim, kIsWide>::shared(d.cut), d);
  });
}

// Does so for a cache of int8: in a file of its own, so that both are compiled side by side.
void decode_quantised_parts(const Context& context, const Decode& d);

}  // namespace fastlm
