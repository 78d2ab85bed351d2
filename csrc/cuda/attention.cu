// attention, forward: out = softmax(s) v, lse = log sum exp(s), s as csrc/contract/attention.h has it; dense
// and packed sequences.
//
// A block computes 128 queries of one head (64 where heads are wide), a warp 16 of them: their sums and
// running maxima stay in registers. Tiles of keys and values come through shared memory by cp.async, a tile
// of values while the scores of its keys are computed, the next keys while values are multiplied. Tiles that
// no query sees are not loaded. q, out and lse move once; k and v once per block, mostly from the
// second-level cache, as blocks of one head run side by side. Bound: 4 * dim FLOPs per pair of query and key
// that see each other. Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
#include "attention.cuh"

namespace fastlm {
namespace {

// Rows are queries, a step keys. Shared memory holds (rows + 2 * step) * (dim + 16 bytes).
__host__ __device__ constexpr Tiles forward_tiles(int bytes, int dim) {
  if (bytes == 4) {
    if (dim <= 128) return {64, 32, 4, 1, 1};  // 68 KB at 128: two blocks a multiprocessor of sm_80
    return {32, 16, 4, 2, 1};                  // 67 KB; 64 registers are sums of out: with 128 it spills
  }
  if (dim <= 64) return {128, 32, 8, 1, 1};   // 118 registers; with 64 keys sm_90 spills at 128
  if (dim <= 128) return {128, 64, 8, 1, 1};  // 70 KB at 128
  return {64, 32, 4, 1, 1};                   // 68 KB; 128 registers are sums of out
}

// Blocks that a multiprocessor shall have registers for: two of 256 threads with 128 each, where that is
// enough.
__host__ __device__ constexpr int forward_blocks(int bytes, int dim, bool extras) {
  return bytes == 2 && dim <= 64 && !extras ? 2 : 1;
}

// What a thread knows of its two rows, and the warp of its 16.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};  // the largest score so far
  float total[2] = {0, 0};                // of this lane's columns alone
};

// s becomes exp2(s - the largest so far), times factor first if the scores are raw; returns in `shrink` what
// sums of earlier tiles are to be multiplied with.
template <bool kRaw, int kCols>
__device__ void exponentiate(Softmax& rows, Sums<kCols>& s, float factor, float (&shrink)[2]) {
  const float scale = kRaw ? factor : 1.0f;
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = rows.top[r];
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = row_all(top, Max{});
    base[r] = top == -INFINITY ? 0.0f : top * scale;  // of a row that has seen no key yet
    shrink[r] = exp2_of(rows.top[r] * scale - base[r]);
    rows.top[r] = top;
    rows.total[r] *= shrink[r];
  }
  for_numbers<kCols>([&](int n, int e, int, int) {
    s[n][e] = exp2_of(kRaw ? fmaf(s[n][e], scale, -base[e / 2]) : s[n][e] - base[e / 2]);
    rows.total[e / 2] += s[n][e];
  });
}

// Writes what rows of no sequence give.
template <class T, int kDim>
__device__ void fill_gaps(const AttentionForward& a, const Sequence& seq, int64_t b, int64_t h) {
  for_gaps(a.in.q.starts, b, a.in.batch, seq.first_q, seq.nq, a.in.queries, [&](int64_t row) {
    T* const to = static_cast<T*>(a.out) + (row * a.in.heads + h) * kDim;
    for (int col = threadIdx.x; col < kDim; col += blockDim.x) to[col] = rounded_to<T>(0.0f);
    if (threadIdx.x == 0) a.lse[h * a.in.queries + row] = -INFINITY;
  });
}

// One block: its queries from `first` on, in shared memory from of_q on, and the keys that they see.
template <class T, int kDim, bool kExtras>
struct ForwardBlock {
  static constexpr Tiles kTiles = forward_tiles(sizeof(T), kDim);
  static constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  static constexpr int kRowPitch = kPitch<T, kDim>, kCols = kDim / kTiles.split;

  const AttentionForward& a;
  const DropoutScale& dropout;
  const Sequence& seq;
  int b, h, first;
  T* of_q;
  T* of_k = of_q + kRows * kRowPitch;
  T* of_v = of_k + kStep * kRowPitch;
  Head head = head_of(a.in, b, h);
  Matrix<T> k = matrix_of<T>(a.in.k, b, kv_head_of(a.in, h), seq.first_k);
  Matrix<T> v = matrix_of<T>(a.in.v, b, kv_head_of(a.in, h), seq.first_k);
  int i0 = first + static_cast<int>(threadIdx.x / 32) % (kRows / 16) * 16;  // this warp's 16, and its columns
  int col0 = static_cast<int>(threadIdx.x / 32) / (kRows / 16) * kCols;
  T* own_q = of_q + (i0 - first) * kRowPitch;

  __device__ void load_queries() const {
    copy_rows_async<T, kRows, kDim, kThreads>(of_q, matrix_of<T>(a.in.q, b, h, seq.first_q), first, seq.nq);
  }

  // Adds up what all keys give.
  __device__ void along(Softmax& rows, Sums<kCols>& sums) const {
    const Span keys = keys_of(seq, first, kRows, kStep);
    if (keys.begin < keys.end) copy_rows_async<T, kStep, kDim, kThreads>(of_k, k, keys.begin, seq.nk);
    commit_copies();
    for (int j0 = keys.begin; j0 < keys.end; j0 += kStep) {
      const bool sees = seq.sees(i0, i0 + 15, j0, j0 + kStep - 1);
      wait_for_copies<0>();
      __syncthreads();  // the keys are here, and the values before have been multiplied
      copy_rows_async<T, kStep, kDim, kThreads>(of_v, v, j0, seq.nk);
      commit_copies();
      Sums<kStep> s;
      set_zero<kStep>(s);
      if (sees) add_product_of_rows<T, kStep, kDim>(s, own_q, of_k);
      wait_for_copies<0>();
      __syncthreads();  // the values are here, and the keys are no longer needed
      if (j0 + kStep < keys.end) copy_rows_async<T, kStep, kDim, kThreads>(of_k, k, j0 + kStep, seq.nk);
      commit_copies();
      if (sees) add_values(j0, s, rows, sums);
    }
    wait_for_copies<0>();
    __syncthreads();  // where no key is seen, the queries arrive only now; and nobody reads them any more
  }

  // Adds what values from j0 on give with the weights of s = q.k.
  __device__ void add_values(int j0, Sums<kStep>& s, Softmax& rows, Sums<kCols>& sums) const {
    if constexpr (kExtras) to_scores<false, kStep>(a.in, head, seq, i0, j0, s, nullptr);
    hide<false, kExtras, kStep>(a.in, head, seq, i0, j0, -INFINITY, s);
    float shrink[2];
    exponentiate<!kExtras, kStep>(rows, s, head.factor, shrink);
    if (kExtras && dropout.seed) drop<kStep>(s, survivors<false, kStep>(dropout, head.number, i0, j0), 1.0f);
    for_numbers<kCols>([&](int n, int e, int, int) { sums[n][e] *= shrink[e / 2]; });
    add_product<T, kCols, kStep, kRowPitch>(sums, s, of_v + col0);
  }

  // Writes lse of a warp's rows, and of out its columns.
  __device__ void store(const Softmax& rows, const Sums<kCols>& sums) const {
    const float factor = kExtras ? 1.0f : head.factor;
    float weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_all(rows.total[r], Add{});
      weight[r] = total == 0 ? 0.0f : dropout.scale / total;
      const int i = i0 + lane_row() + 8 * r;
      const float lse = total == 0 ? -INFINITY : (rows.top[r] * factor + __log2f(total)) * kLn2;
      if (i < seq.nq && lane_col() == 0 && col0 == 0) a.lse[first_row(a.in, seq, b, h) + i] = lse;
    }
    T* const out = static_cast<T*>(a.out) + ((seq.first_q + i0) * a.in.heads + h) * kDim + col0;
    store_tile<T, kCols, kRowPitch>(sums, weight, own_q + col0, out, a.in.heads * kDim, seq.nq - i0);
  }
};

template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(forward_tiles(sizeof(T), kDim).threads(),
                                  forward_blocks(sizeof(T), kDim, kExtras))
    attention_forward_kernel(const AttentionForward a, const DropoutScale dropout) {
  using Own = ForwardBlock<T, kDim, kExtras>;
  extern __shared__ uint4 shared[];
  const int tiles = static_cast<int>(blocks_along(a.in.q, a.in.queries, a.in.longest_q, Own::kRows));
  const Block at(tiles, a.in.heads);
  const int tile = tiles - 1 - at.tile;  // the longest rows first
  const Sequence seq = sequence_of(a.in, at.batch);
  if (a.in.q.starts && tile == 0) fill_gaps<T, kDim>(a, seq, at.batch, at.head);
  const int first = tile * Own::kRows;
  if (first >= seq.nq) return;

  const Own own = {a, dropout, seq, at.batch, at.head, first, reinterpret_cast<T*>(shared)};
  Softmax rows;
  Sums<Own::kCols> sums;
  set_zero<Own::kCols>(sums);
  own.load_queries();
  own.along(rows, sums);
  if (own.i0 < seq.nq) own.store(rows, sums);
}

}  // namespace

void attention_forward(const Context& context, const AttentionForward& a) {
  with_attention(a.in, [&]<class T, int kDim, bool kExtras>() {
    constexpr Tiles kTiles = forward_tiles(sizeof(T), kDim);
    constexpr size_t kShared = (kTiles.rows + 2 * kTiles.step) * kPitch<T, kDim> * sizeof(T);
    const int64_t tiles = blocks_along(a.in.q, a.in.queries, a.in.longest_q, kTiles.rows);
    launch("attention", context, attention_forward_kernel<T, kDim, kExtras>, tiles * a.in.heads * a.in.batch,
           kTiles.threads(), kShared, a, DropoutScale(a.in.dropout));
  });
}

}  // namespace fastlm
