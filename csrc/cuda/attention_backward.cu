// attention, backward, dense and packed: a number has one writer, so no sum needs atomics.
//
// With dp_ij = dout_i . v_j (dropped as p was), delta_i = sum_j p_ij dp_ij = dout_i . out_i:
// ds_ij = p_ij (dp_ij - delta_i + dlse_i); through softcap times 1 - tanh^2; dq_i = scale * sum_j ds_ij k_j;
// dk_j = scale * sum_i ds_ij q_i; dv_j = sum_i p_ij dout_i; dbias = ds, summed where bias is broadcast.
//
// dq: a block has 64 queries of a head; first delta, kept for the others, then keys as in forward. dkv: 64 or
// 128 keys of a key head; the queries that see them, of all query heads that read it, and p and ds
// transposed, so that a warp's rows are keys. dbias: a tile of bias; all that it is broadcast to. p is
// computed anew in each. A block's own rows stay in shared memory, tiles of the others come by cp.async one
// step ahead. Bound: 14 * dim FLOPs a pair, where one kernel with atomics has 10; if exact 18: then delta and
// the sum of p come from the very dp and scores that they meet, as delta from a rounded out is too coarse for
// float32 gradients (of one key ds must be 0). Source: Dao, "FlashAttention-2",
// https://arxiv.org/abs/2307.08691.
#include "attention.cuh"

namespace fastlm {
namespace {

// Tiles' shared memory is (2 * rows + 2 * stages * step) * (dim + 16 bytes): at most 99 KB, all that a block
// of sm_86, sm_89 and sm_120 has.

// Rows are queries, a step keys.
__host__ __device__ constexpr Tiles dq_tiles(int bytes, int dim) {
  if (bytes == 4) {
    if (dim <= 128) return {64, 16, 4, 1, 2};  // 99 KB at 128
    return {32, 16, 2, 1, 1};                  // 98 KB
  }
  if (dim <= 128) return {64, 32, 4, 1, 2};  // 68 KB at 128: two blocks a multiprocessor of sm_80
  return {64, 16, 4, 1, 2};                  // 99 KB
}

// Rows are keys, a step queries.
__host__ __device__ constexpr Tiles dkv_tiles(int bytes, int dim) {
  if (bytes == 4) {
    if (dim <= 64) return {64, 16, 4, 1, 2};   // 51 KB at 64
    if (dim <= 128) return {32, 16, 4, 2, 2};  // 66 KB at 128: two blocks a multiprocessor of sm_80
    return {32, 16, 8, 4, 1};                  // 98 KB; 64 registers are sums: with 128 it spills
  }
  if (dim <= 64) return {128, 32, 8, 1, 2};  // 54 KB at 64
  if (dim <= 128) return {64, 16, 4, 1, 2};  // 51 KB at 128; 128 registers are sums: a step of 32 spills
  return {64, 16, 8, 2, 2};                  // 99 KB; 128 registers are sums, of one warp 256 would be
}

// Rows are queries, a step keys: of bias, a tile.
__host__ __device__ constexpr Tiles dbias_tiles(int bytes, int dim) {
  if (bytes == 4 && dim > 128) return {32, 16, 2, 1, 1};  // 98 KB
  return {64, 32, 4, 1, 1};                               // 99 KB at 128 of float32, at 256 of half precision
}

template <class T, int kDim>
constexpr size_t shared_bytes(const Tiles& tiles) {
  return (2 * tiles.rows + 2 * tiles.stages * tiles.step) * kPitch<T, kDim> * sizeof(T);
}

// What a row of scores is to become weights, and its gradient: p = exp2(s - base) * norm; of an empty row 0.
struct Row {
  float base, delta, norm;
};

// Of what the kernel of dq leaves for the others: how far its three numbers are apart.
__device__ int64_t rows_of_lse(const AttentionInputs& in) {
  return in.heads * in.queries * (in.q.starts ? 1 : in.batch);
}

__device__ void keep_row(const AttentionBackward& a, int64_t at, const Row& row) {
  const int64_t size = rows_of_lse(a.in);
  a.rows[at] = row.base;
  a.rows[size + at] = row.delta;
  a.rows[2 * size + at] = row.norm;
}

__device__ Row kept_row(const AttentionBackward& a, int64_t at, bool inside) {
  const int64_t size = rows_of_lse(a.in);
  return inside ? Row{a.rows[at], a.rows[size + at], a.rows[2 * size + at]} : Row{INFINITY, 0, 0};
}

// Calls use(step, stage) for steps 0 ... steps - 1, each when what load(step, stage) has started to copy is
// there; the next one's is on its way meanwhile if there are two stages.
template <int kStages, class Load, class Use>
__device__ void walk(int steps, Load&& load, Use&& use) {
  if (kStages == 2 && steps > 0) load(0, 0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    const int stage = kStages == 2 ? step % 2 : 0;
    if (kStages == 1) load(step, 0);
    if (kStages == 2 && step + 1 < steps) load(step + 1, 1 - stage);
    commit_copies();
    wait_for_copies<kStages - 1>();
    __syncthreads();  // what all threads copied is here
    use(step, stage);
    __syncthreads();  // and no longer needed
  }
  wait_for_copies<0>();
  __syncthreads();
}

// s = q.k becomes weights; row(n, e) is what a pair's row has. bends: as to_scores gives them.
template <bool kKeysAreRows, bool kExtras, int kCols, class F>
__device__ void to_weights(const AttentionInputs& in, const Head& head, const Sequence& seq, int i0, int j0,
                           Sums<kCols>& s, Sums<kCols>* bends, F&& row) {
  if constexpr (kExtras) to_scores<kKeysAreRows, kCols>(in, head, seq, i0, j0, s, bends);
  for_numbers<kCols>([&](int n, int e, int, int) {
    const Row r = row(n, e);
    s[n][e] = kExtras ? exp2_of(s[n][e] - r.base) * r.norm : exp2_of(fmaf(s[n][e], head.factor, -r.base));
  });
  hide<kKeysAreRows, kExtras, kCols>(in, head, seq, i0, j0, 0.0f, s);
}

// p becomes ds, of p and dp, before softcap.
template <int kCols, class F>
__device__ void to_gradients(Sums<kCols>& p, const Sums<kCols>& dp, F&& row) {
  for_numbers<kCols>([&](int n, int e, int, int) { p[n][e] *= dp[n][e] - row(n, e).delta; });
}

template <int kCols>
__device__ void multiply_all(Sums<kCols>& x, const Sums<kCols>& by) {
  for_numbers<kCols>([&](int n, int e, int, int) { x[n][e] *= by[n][e]; });
}

// A row from what forward gave; the four lanes that have it call it together.
template <class T, int kDim>
__device__ Row row_of_forward(const T* dout, const T* out, const float* lse, bool inside) {
  float delta = 0;
  for (int col = threadIdx.x % 4 * kWide<T>; inside && dout && col < kDim; col += 4 * kWide<T>) {
    float x[kWide<T>], y[kWide<T>];
    load<kWide<T>>(dout + col, x);
    load<kWide<T>>(out + col, y);
#pragma unroll
    for (int k = 0; k < kWide<T>; ++k) delta = fmaf(x[k], y[k], delta);
  }
  const float sum = inside ? *lse : -INFINITY;
  return {sum == -INFINITY ? INFINITY : sum * kLog2E, row_all(delta, Add{}), 1};
}

// Running sums of p and of p * dp of a row, as in forward.
struct Mixture {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, mixed[2] = {0, 0};

  template <int kCols>
  __device__ void add(const Sums<kCols>& s, const Sums<kCols>& dp) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float higher = top[r];
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) higher = fmaxf(higher, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      higher = row_all(higher, Max{});
      const float base = higher == -INFINITY ? 0.0f : higher, shrink = exp2_of(top[r] - base);
      float weights = 0, products = 0;
#pragma unroll
      for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          const float p = exp2_of(s[n][e] - base);
          weights += p;
          products = fmaf(p, dp[n][e], products);
        }
      }
      total[r] = total[r] * shrink + weights;
      mixed[r] = mixed[r] * shrink + products;
      top[r] = higher;
    }
  }

  __device__ Row row(int r) const {
    const float sum = row_all(total[r], Add{}), product = row_all(mixed[r], Add{});
    return sum == 0 ? Row{INFINITY, 0, 0} : Row{top[r], product / sum, 1 / sum};
  }
};

template <class T, int kDim>
__device__ void zero_gaps(void* to, const int32_t* starts, int64_t b, int64_t batch, int64_t first,
                          int64_t count, int64_t tokens, int64_t heads, int64_t head) {
  if (!to) return;
  for_gaps(starts, b, batch, first, count, tokens, [&](int64_t row) {
    T* const at = static_cast<T*>(to) + (row * heads + head) * kDim;
    for (int col = threadIdx.x; col < kDim; col += blockDim.x) at[col] = rounded_to<T>(0.0f);
  });
}

template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(dq_tiles(sizeof(T), kDim).threads(), 1)
    attention_dq_kernel(const AttentionBackward a, const DropoutScale dropout, bool exact) {
  constexpr Tiles kTiles = dq_tiles(sizeof(T), kDim);
  constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  constexpr int kRowPitch = kPitch<T, kDim>;
  extern __shared__ uint4 shared[];
  T* const of_q = reinterpret_cast<T*>(shared);
  T* const of_dout = of_q + kRows * kRowPitch;
  T* const of_k = of_dout + kRows * kRowPitch;
  T* const of_v = of_k + kTiles.stages * kStep * kRowPitch;

  const int tiles = static_cast<int>(blocks_along(a.in.q, a.in.queries, a.in.longest_q, kRows));
  const Block at(tiles, a.in.heads);
  const int tile = tiles - 1 - at.tile, h = at.head, b = at.batch;  // the longest rows first
  const Sequence seq = sequence_of(a.in, b);
  if (a.in.q.starts && tile == 0) {
    zero_gaps<T, kDim>(a.dq, a.in.q.starts, b, a.in.batch, seq.first_q, seq.nq, a.in.queries, a.in.heads, h);
  }
  const int first = tile * kRows;
  if (first >= seq.nq) return;

  const Head head = head_of(a.in, b, h);
  const int kv_head = kv_head_of(a.in, h);
  const Matrix<T> k = matrix_of<T>(a.in.k, b, kv_head, seq.first_k);
  const Matrix<T> v = matrix_of<T>(a.in.v, b, kv_head, seq.first_k);
  const Matrix<T> dout = matrix_of<T>(a.dout, b, h, seq.first_q);
  const int begin = max(0, first + seq.low) / kStep * kStep;
  const int end = min(seq.nk, min(first + kRows, seq.nq) + seq.high);
  const int steps = end > begin ? (end - begin + kStep - 1) / kStep : 0;
  const int i0 = first + static_cast<int>(threadIdx.x / 32) * 16;
  T* const own_q = of_q + (i0 - first) * kRowPitch;
  const T* const own_dout = of_dout + (i0 - first) * kRowPitch;

  const bool from_scores = kExtras && exact;
  if (a.dq || from_scores) {
    copy_rows_async<T, kRows, kDim, kThreads>(of_q, matrix_of<T>(a.in.q, b, h, seq.first_q), first, seq.nq);
    copy_rows_async<T, kRows, kDim, kThreads>(of_dout, dout, first, a.dout.data ? seq.nq : 0);
  }
  const auto load = [&](int step, int stage) {
    const int j0 = begin + step * kStep;
    copy_rows_async<T, kStep, kDim, kThreads>(of_k + stage * kStep * kRowPitch, k, j0, seq.nk);
    copy_rows_async<T, kStep, kDim, kThreads>(of_v + stage * kStep * kRowPitch, v, j0, seq.nk);
  };
  const auto weight_gradients = [&](int j0, int stage, Sums<kStep>& dp) {
    set_zero<kStep>(dp);
    add_product_of_rows<T, kStep, kDim>(dp, own_dout, of_v + stage * kStep * kRowPitch);
    if (kExtras && dropout.seed) {
      drop<kStep>(dp, survivors<false, kStep>(dropout, head.number, i0, j0), dropout.scale);
    }
  };

  Row rows[2];
  const int64_t row0 = first_row(a.in, seq, b, h) + i0 + lane_row();
  if (from_scores) {
    Mixture mixture;
    walk<kTiles.stages>(steps, load, [&](int step, int stage) {
      const int j0 = begin + step * kStep;
      if (!seq.sees(i0, i0 + 15, j0, j0 + kStep - 1)) return;
      Sums<kStep> s, dp;
      set_zero<kStep>(s);
      add_product_of_rows<T, kStep, kDim>(s, own_q, of_k + stage * kStep * kRowPitch);
      to_scores<false, kStep>(a.in, head, seq, i0, j0, s, nullptr);
      hide<false, true, kStep>(a.in, head, seq, i0, j0, -INFINITY, s);
      weight_gradients(j0, stage, dp);
      mixture.add<kStep>(s, dp);
    });
    rows[0] = mixture.row(0), rows[1] = mixture.row(1);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t i = i0 + lane_row() + 8 * r, row = row0 + 8 * r;
    const bool inside = i < seq.nq;
    if (!exact) {
      const T* const out = static_cast<const T*>(a.out) + ((seq.first_q + i) * a.in.heads + h) * kDim;
      const T* const of_i = a.dout.data ? dout.data + i * dout.stride : nullptr;
      rows[r] = row_of_forward<T, kDim>(of_i, out, a.lse + row, inside);
    }
    if (!inside) continue;
    if (a.dlse) rows[r].delta -= a.dlse[row];
    if (lane_col() == 0) keep_row(a, row, rows[r]);
  }
  if (!a.dq) return;

  const auto row = [&](int, int e) { return rows[e / 2]; };
  Sums<kDim> sums;
  set_zero<kDim>(sums);
  walk<kTiles.stages>(steps, load, [&](int step, int stage) {
    const int j0 = begin + step * kStep;
    if (!seq.sees(i0, i0 + 15, j0, j0 + kStep - 1)) return;
    const T* const keys = of_k + stage * kStep * kRowPitch;
    Sums<kStep> s, bends, dp;
    set_zero<kStep>(s);
    add_product_of_rows<T, kStep, kDim>(s, own_q, keys);
    to_weights<false, kExtras, kStep>(a.in, head, seq, i0, j0, s, &bends, row);
    if constexpr (kExtras) multiply_all<kStep>(bends, s);
    weight_gradients(j0, stage, dp);
    to_gradients<kStep>(kExtras ? bends : s, dp, row);
    add_product<T, kDim, kStep, kRowPitch>(sums, kExtras ? bends : s, keys);
  });
  if (i0 >= seq.nq) return;
  const float scale[2] = {a.in.scale, a.in.scale};
  T* const dq = static_cast<T*>(a.dq) + ((seq.first_q + i0) * a.in.heads + h) * kDim;
  store_tile<T, kDim, kRowPitch>(sums, scale, own_q, dq, a.in.heads * kDim, seq.nq - i0);
}

// What a thread's columns of queries from i0 on have.
template <int kCols>
struct Columns {
  Row of[kCols / 8][2];

  __device__ Columns(const AttentionBackward& a, const Sequence& seq, int64_t row0, int i0) {
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = i0 + 8 * n + lane_col() + c;
        of[n][c] = kept_row(a, row0 + i, i < seq.nq);
      }
    }
  }
  __device__ Row operator()(int n, int e) const { return of[n][e % 2]; }
};

template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(dkv_tiles(sizeof(T), kDim).threads(), 1)
    attention_dkv_kernel(const AttentionBackward a, const DropoutScale dropout) {
  constexpr Tiles kTiles = dkv_tiles(sizeof(T), kDim);
  constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  constexpr int kRowPitch = kPitch<T, kDim>, kCols = kDim / kTiles.split;
  extern __shared__ uint4 shared[];
  T* const of_k = reinterpret_cast<T*>(shared);
  T* const of_v = of_k + kRows * kRowPitch;
  T* const of_q = of_v + kRows * kRowPitch;
  T* const of_dout = of_q + kTiles.stages * kStep * kRowPitch;

  const Block at(static_cast<int>(blocks_along(a.in.k, a.in.keys, a.in.longest_k, kRows)), a.in.kv_heads);
  const int tile = at.tile, kv_head = at.head, b = at.batch;
  const Sequence seq = sequence_of(a.in, b);
  if (a.in.k.starts && tile == 0) {
    for (void* to : {a.dk, a.dv}) {
      zero_gaps<T, kDim>(to, a.in.k.starts, b, a.in.batch, seq.first_k, seq.nk, a.in.keys, a.in.kv_heads,
                         kv_head);
    }
  }
  const int first = tile * kRows, written = a.in.k.starts ? seq.nk : static_cast<int>(a.in.keys);
  if (first >= written) return;

  const int warp = threadIdx.x / 32, of_row = warp % (kRows / 16), col0 = warp / (kRows / 16) * kCols;
  const int j0 = first + of_row * 16;
  const int begin = max(0, first - seq.high) / kStep * kStep;
  const int end = first < seq.nk ? min(seq.nq, min(first + kRows, seq.nk) - seq.low) : 0;
  const int steps = end > begin ? (end - begin + kStep - 1) / kStep : 0;
  const int group = static_cast<int>(a.in.heads / a.in.kv_heads);
  T* const own_k = of_k + of_row * 16 * kRowPitch;
  T* const own_v = of_v + of_row * 16 * kRowPitch;

  copy_rows_async<T, kRows, kDim, kThreads>(of_k, matrix_of<T>(a.in.k, b, kv_head, seq.first_k), first,
                                            seq.nk);
  copy_rows_async<T, kRows, kDim, kThreads>(of_v, matrix_of<T>(a.in.v, b, kv_head, seq.first_k), first,
                                            seq.nk);
  const auto load = [&](int step, int stage) {
    const int h = kv_head * group + step / steps;
    const int i0 = begin + step % steps * kStep;
    copy_rows_async<T, kStep, kDim, kThreads>(of_q + stage * kStep * kRowPitch,
                                              matrix_of<T>(a.in.q, b, h, seq.first_q), i0, seq.nq);
    copy_rows_async<T, kStep, kDim, kThreads>(of_dout + stage * kStep * kRowPitch,
                                              matrix_of<T>(a.dout, b, h, seq.first_q), i0,
                                              a.dout.data ? seq.nq : 0);
  };

  Sums<kCols> dk, dv;
  set_zero<kCols>(dk);
  set_zero<kCols>(dv);
  walk<kTiles.stages>(steps * group, load, [&](int step, int stage) {
    const int i0 = begin + step % steps * kStep;
    if (!seq.sees(i0, i0 + kStep - 1, j0, j0 + 15)) return;
    const int h = kv_head * group + step / steps;
    const Head head = head_of(a.in, b, h);
    const Columns<kStep> columns(a, seq, first_row(a.in, seq, b, h), i0);
    const T* const queries = of_q + stage * kStep * kRowPitch;
    const T* const douts = of_dout + stage * kStep * kRowPitch;
    Sums<kStep> p, bends, dp;
    set_zero<kStep>(p);
    add_product_of_rows<T, kStep, kDim>(p, own_k, queries);
    to_weights<true, kExtras, kStep>(a.in, head, seq, i0, j0, p, &bends, columns);
    if constexpr (kExtras) multiply_all<kStep>(bends, p);
    const bool drops = kExtras && dropout.seed;
    const uint32_t kept = drops ? survivors<true, kStep>(dropout, head.number, i0, j0) : 0;
    set_zero<kStep>(dp);
    add_product_of_rows<T, kStep, kDim>(dp, own_v, douts);
    if (drops) drop<kStep>(dp, kept, dropout.scale);
    Sums<kStep> ds;
    for_numbers<kStep>([&](int n, int e, int, int) { ds[n][e] = kExtras ? bends[n][e] : p[n][e]; });
    to_gradients<kStep>(ds, dp, columns);
    if (drops) drop<kStep>(p, kept, dropout.scale);
    add_product<T, kCols, kStep, kRowPitch>(dv, p, douts + col0);
    add_product<T, kCols, kStep, kRowPitch>(dk, ds, queries + col0);
  });
  if (j0 >= written) return;
  const int64_t stride = a.in.kv_heads * kDim;
  const int64_t place = (seq.first_k + j0) * stride + kv_head * kDim + col0;
  const float scale[2] = {a.in.scale, a.in.scale}, one[2] = {1, 1};
  if (a.dk) {
    store_tile<T, kCols, kRowPitch>(dk, scale, own_k + col0, static_cast<T*>(a.dk) + place, stride,
                                    written - j0);
  }
  if (a.dv) {
    store_tile<T, kCols, kRowPitch>(dv, one, own_v + col0, static_cast<T*>(a.dv) + place, stride,
                                    written - j0);
  }
}

// dbias's sizes as the grid is cut by them: where bias is broadcast, 1.
struct BiasTiles {
  int64_t batch, heads, rows, cols;  // rows, cols: tiles
  bool sums_rows, sums_cols;

  __host__ __device__ BiasTiles(const AttentionBackward& a, const Tiles& tiles)
      : batch(a.dbias_strides[0] == 0 ? 1 : a.in.batch),
        heads(a.dbias_strides[1] == 0 ? 1 : a.in.heads),
        rows(a.dbias_strides[2] == 0 ? 1 : blocks_of(a.in.queries, tiles.rows)),
        cols(a.dbias_strides[3] == 0 ? 1 : blocks_of(a.in.keys, tiles.step)),
        sums_rows(a.dbias_strides[2] == 0),
        sums_cols(a.dbias_strides[3] == 0) {}
};

// A long sum with what its rounding has lost (Kahan, "Further remarks on reducing truncation errors", CACM
// 1965): of over 200 heads a plain one is further off than the 2x rule allows.
template <int kCols>
struct LongSums {
  Sums<kCols> sum, lost;

  __device__ LongSums() { set_zero<kCols>(sum), set_zero<kCols>(lost); }
  __device__ void add(const Sums<kCols>& x) {
    for_numbers<kCols>([&](int n, int e, int, int) {
      const float more = __fsub_rn(x[n][e], lost[n][e]), total = __fadd_rn(sum[n][e], more);
      lost[n][e] = __fsub_rn(__fsub_rn(total, sum[n][e]), more);
      sum[n][e] = total;
    });
  }
};

// Writes a block's sums, from (b, h, i0, j0) on; along axes where bias is broadcast their sum.
template <int kRows, int kCols, int kThreads>
__device__ void store_bias(const AttentionBackward& a, const BiasTiles& tiles, float* staging,
                           const Sums<kCols>& sums, int64_t b, int64_t h, int i0, int j0) {
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  for_numbers<kCols>(
      [&](int n, int e, int row, int col) { staging[(warp_row + row) * (kCols + 1) + col] = sums[n][e]; });
  __syncthreads();
  const int rows = tiles.sums_rows ? 1 : kRows, cols = tiles.sums_cols ? 1 : kCols;
  for (int at = threadIdx.x; at < rows * cols; at += kThreads) {
    const int row = at / cols, col = at % cols;
    float sum = 0;
    for (int r = row; r < (tiles.sums_rows ? kRows : row + 1); ++r) {
      float of_row = 0;
      for (int c = col; c < (tiles.sums_cols ? kCols : col + 1); ++c) of_row += staging[r * (kCols + 1) + c];
      sum += of_row;
    }
    const int64_t i = i0 + row, j = j0 + col;
    if (i < a.in.queries && j < a.in.keys) {
      a.dbias[b * a.dbias_strides[0] + h * a.dbias_strides[1] + i * a.dbias_strides[2] +
              j * a.dbias_strides[3]] = sum;
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(dbias_tiles(sizeof(T), kDim).threads(), 1)
    attention_dbias_kernel(const AttentionBackward a, const DropoutScale dropout) {
  constexpr Tiles kTiles = dbias_tiles(sizeof(T), kDim);
  constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  constexpr int kRowPitch = kPitch<T, kDim>;
  extern __shared__ uint4 shared[];
  T* const of_q = reinterpret_cast<T*>(shared);
  T* const of_dout = of_q + kRows * kRowPitch;
  T* const of_k = of_dout + kRows * kRowPitch;
  T* const of_v = of_k + kStep * kRowPitch;

  const BiasTiles tiles(a, kTiles);
  const int tile_col = static_cast<int>(blockIdx.x % tiles.cols);
  const int tile_row = static_cast<int>(blockIdx.x / tiles.cols % tiles.rows);
  const int64_t owner = blockIdx.x / tiles.cols / tiles.rows;
  const int64_t own_h = owner % tiles.heads, own_b = owner / tiles.heads;
  const int64_t over_h = a.in.heads / tiles.heads, over_b = a.in.batch / tiles.batch;
  const int end_i = static_cast<int>(tiles.sums_rows ? a.in.queries : (tile_row + 1) * kRows);
  const int end_j = static_cast<int>(tiles.sums_cols ? a.in.keys : (tile_col + 1) * kStep);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;

  LongSums<kStep> sums;
  for (int64_t of = 0; of < over_b * over_h; ++of) {
    const int64_t b = own_b + of / over_h, h = own_h + of % over_h,
                  kv_head = h / (a.in.heads / a.in.kv_heads);
    const Sequence seq = sequence_of(a.in, b);
    const Head head = head_of(a.in, b, h);
    for (int i0 = tile_row * kRows; i0 < end_i; i0 += kRows) {
      for (int j0 = tile_col * kStep; j0 < end_j; j0 += kStep) {
        if (!seq.sees(i0, i0 + kRows - 1, j0, j0 + kStep - 1)) continue;
        __syncthreads();  // the tiles before are no longer needed
        const Matrix<T> dout = matrix_of<T>(a.dout, b, h, 0);
        copy_rows_async<T, kRows, kDim, kThreads>(of_q, matrix_of<T>(a.in.q, b, h, 0), i0, seq.nq);
        copy_rows_async<T, kRows, kDim, kThreads>(of_dout, dout, i0, a.dout.data ? seq.nq : 0);
        copy_rows_async<T, kStep, kDim, kThreads>(of_k, matrix_of<T>(a.in.k, b, kv_head, 0), j0, seq.nk);
        copy_rows_async<T, kStep, kDim, kThreads>(of_v, matrix_of<T>(a.in.v, b, kv_head, 0), j0, seq.nk);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        const int i = i0 + warp_row;
        if (!seq.sees(i, i + 15, j0, j0 + kStep - 1)) continue;
        const int64_t row0 = first_row(a.in, seq, b, h) + i + lane_row();
        const Row rows[2] = {kept_row(a, row0, i + lane_row() < seq.nq),
                             kept_row(a, row0 + 8, i + lane_row() + 8 < seq.nq)};
        const auto row = [&](int, int e) { return rows[e / 2]; };
        Sums<kStep> p, dp;
        set_zero<kStep>(p);
        add_product_of_rows<T, kStep, kDim>(p, of_q + warp_row * kRowPitch, of_k);
        to_weights<false, true, kStep>(a.in, head, seq, i, j0, p, nullptr, row);
        set_zero<kStep>(dp);
        add_product_of_rows<T, kStep, kDim>(dp, of_dout + warp_row * kRowPitch, of_v);
        if (dropout.seed) {
          drop<kStep>(dp, survivors<false, kStep>(dropout, head.number, i, j0), dropout.scale);
        }
        to_gradients<kStep>(p, dp, row);
        sums.add(p);
      }
    }
  }
  __syncthreads();
  store_bias<kRows, kStep, kThreads>(a, tiles, reinterpret_cast<float*>(shared), sums.sum, own_b, own_h,
                                     tile_row * kRows, tile_col * kStep);
}

template <class T, int kDim, bool kExtras>
void launch_backward(const Context& context, const AttentionBackward& a) {
  constexpr Tiles kDq = dq_tiles(sizeof(T), kDim), kDkv = dkv_tiles(sizeof(T), kDim);
  const DropoutScale dropout(a.in.dropout);
  const bool exact = sizeof(T) == 4 || (a.dbias && a.in.bias_dtype == DType::kFloat32);
  const int64_t of_q = blocks_along(a.in.q, a.in.queries, a.in.longest_q, kDq.rows);
  launch("attention_backward", context, attention_dq_kernel<T, kDim, kExtras>, of_q * a.in.heads * a.in.batch,
         kDq.threads(), shared_bytes<T, kDim>(kDq), a, dropout, exact);
  if (a.dk || a.dv) {
    const int64_t of_k = blocks_along(a.in.k, a.in.keys, a.in.longest_k, kDkv.rows);
    launch("attention_backward", context, attention_dkv_kernel<T, kDim, kExtras>,
           of_k * a.in.kv_heads * a.in.batch, kDkv.threads(), shared_bytes<T, kDim>(kDkv), a, dropout);
  }
  if constexpr (kExtras) {
    if (!a.dbias) return;
    constexpr Tiles kDbias = dbias_tiles(sizeof(T), kDim);
    const BiasTiles tiles(a, kDbias);
    launch("attention_backward", context, attention_dbias_kernel<T, kDim>,
           tiles.batch * tiles.heads * tiles.rows * tiles.cols, kDbias.threads(),
           shared_bytes<T, kDim>(kDbias), a, dropout);
  }
}

}  // namespace

void attention_backward(const Context& context, const AttentionBackward& a) {
  with_attention(a.in,
                 [&]<class T, int kDim, bool kExtras>() { launch_backward<T, kDim, kExtras>(context, a); });
}

}  // namespace fastlm
