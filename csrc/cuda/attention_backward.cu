// attention, backward, the first kernel: dq, and what each row of scores becomes weights by, for the others.
//
// A block has 64 queries of a head: first their rows, from what forward gave or from the scores themselves,
// then keys as in forward.
#include "attention_backward.cuh"

namespace fastlm {
namespace {

// Rows are queries, a step keys.
__host__ __device__ constexpr Tiles dq_tiles(int bytes, int dim) {
  if (bytes == 4) {
    if (dim <= 128) return {64, 16, 4, 1, 2};  // 99 KB at 128
    return {32, 16, 2, 1, 1};                  // 98 KB
  }
  if (dim <= 128) return {64, 32, 4, 1, 2};  // 68 KB at 128: two blocks a multiprocessor of sm_80
  return {64, 16, 4, 1, 2};                  // 99 KB
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

// One block: its queries from `first` on, in shared memory from of_q on, and the keys that they see.
template <class T, int kDim, bool kExtras>
struct DqBlock {
  static constexpr Tiles kTiles = dq_tiles(sizeof(T), kDim);
  static constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  static constexpr int kRowPitch = kPitch<T, kDim>;

  const AttentionBackward& a;
  const DropoutScale& dropout;
  const Sequence& seq;
  int b, h, first;
  T* of_q;
  T* of_dout = of_q + kRows * kRowPitch;
  T* of_k = of_dout + kRows * kRowPitch;
  T* of_v = of_k + kTiles.stages * kStep * kRowPitch;
  Head head = head_of(a.in, b, h);
  Matrix<T> k = matrix_of<T>(a.in.k, b, kv_head_of(a.in, h), seq.first_k);
  Matrix<T> v = matrix_of<T>(a.in.v, b, kv_head_of(a.in, h), seq.first_k);
  Matrix<T> dout = matrix_of<T>(a.dout, b, h, seq.first_q);
  Span keys = keys_of(seq, first, kRows, kStep);
  int i0 = first + static_cast<int>(threadIdx.x / 32) * 16;  // this warp's 16
  T* own_q = of_q + (i0 - first) * kRowPitch;
  T* own_dout = of_dout + (i0 - first) * kRowPitch;

  __device__ void load_queries() const {
    copy_rows_async<T, kRows, kDim, kThreads>(of_q, matrix_of<T>(a.in.q, b, h, seq.first_q), first, seq.nq);
    copy_rows_async<T, kRows, kDim, kThreads>(of_dout, dout, first, a.dout.data ? seq.nq : 0);
  }

  // Calls use(j0, its keys, its values) for each step of keys that this warp's queries see.
  template <class F>
  __device__ void for_keys(F&& use) const {
    const auto load = [&](int step, int stage) {
      const int j0 = keys.begin + step * kStep, place = stage * kStep * kRowPitch;
      copy_rows_async<T, kStep, kDim, kThreads>(of_k + place, k, j0, seq.nk);
      copy_rows_async<T, kStep, kDim, kThreads>(of_v + place, v, j0, seq.nk);
    };
    walk<kTiles.stages>(keys.steps(kStep), load, [&](int step, int stage) {
      const int j0 = keys.begin + step * kStep, place = stage * kStep * kRowPitch;
      if (seq.sees(i0, i0 + 15, j0, j0 + kStep - 1)) use(j0, of_k + place, of_v + place);
    });
  }

  // Gradients of the weights of keys from j0 on.
  __device__ void weight_gradients(int j0, const T* values, Sums<kStep>& dp) const {
    set_zero<kStep>(dp);
    add_product_of_rows<T, kStep, kDim>(dp, own_dout, values);
    if (kExtras && dropout.seed) {
      drop<kStep>(dp, survivors<false, kStep>(dropout, head.number, i0, j0), dropout.scale);
    }
  }

  __device__ void rows_of_scores(Row (&rows)[2]) const {
    Mixture mixture;
    for_keys([&](int j0, const T* of_keys, const T* values) {
      Sums<kStep> s, dp;
      set_zero<kStep>(s);
      add_product_of_rows<T, kStep, kDim>(s, own_q, of_keys);
      to_scores<false, kStep>(a.in, head, seq, i0, j0, s, nullptr);
      hide<false, true, kStep>(a.in, head, seq, i0, j0, -INFINITY, s);
      weight_gradients(j0, values, dp);
      mixture.add<kStep>(s, dp);
    });
    rows[0] = mixture.row(0), rows[1] = mixture.row(1);
  }

  // Takes the rows from what forward gave if they are not `known`; keeps them.
  __device__ void keep_rows(bool known, Row (&rows)[2]) const {
    const int64_t row0 = first_row(a.in, seq, b, h) + i0 + lane_row();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t i = i0 + lane_row() + 8 * r, row = row0 + 8 * r;
      const bool inside = i < seq.nq;
      if (!known) {
        const T* const out = static_cast<const T*>(a.out) + ((seq.first_q + i) * a.in.heads + h) * kDim;
        const T* const of_i = a.dout.data ? dout.data + i * dout.stride : nullptr;
        rows[r] = row_of_forward<T, kDim>(of_i, out, a.lse + row, inside);
      }
      if (!inside) continue;
      if (a.dlse) rows[r].delta -= a.dlse[row];
      if (lane_col() == 0) keep_row(a, row, rows[r]);
    }
  }

  __device__ void store_dq(const Row (&rows)[2]) const {
    const auto row = [&](int, int e) { return rows[e / 2]; };
    Sums<kDim> sums;
    set_zero<kDim>(sums);
    for_keys([&](int j0, const T* of_keys, const T* values) {
      Sums<kStep> s, bends, dp;
      set_zero<kStep>(s);
      add_product_of_rows<T, kStep, kDim>(s, own_q, of_keys);
      to_weights<false, kExtras, kStep>(a.in, head, seq, i0, j0, s, &bends, row);
      if constexpr (kExtras) multiply_all<kStep>(bends, s);
      weight_gradients(j0, values, dp);
      to_gradients<kStep>(kExtras ? bends : s, dp, row);
      add_product<T, kDim, kStep, kRowPitch>(sums, kExtras ? bends : s, of_keys);
    });
    if (i0 >= seq.nq) return;
    const float scale[2] = {a.in.scale, a.in.scale};
    T* const dq = static_cast<T*>(a.dq) + ((seq.first_q + i0) * a.in.heads + h) * kDim;
    store_tile<T, kDim, kRowPitch>(sums, scale, own_q, dq, a.in.heads * kDim, seq.nq - i0);
  }
};

template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(dq_tiles(sizeof(T), kDim).threads(), 1)
    attention_dq_kernel(const AttentionBackward a, const DropoutScale dropout, bool exact) {
  using Own = DqBlock<T, kDim, kExtras>;
  extern __shared__ uint4 shared[];
  const int tiles = static_cast<int>(blocks_along(a.in.q, a.in.queries, a.in.longest_q, Own::kRows));
  const Block at(tiles, a.in.heads);
  const int tile = tiles - 1 - at.tile;  // the longest rows first
  const Sequence seq = sequence_of(a.in, at.batch);
  if (a.in.q.starts && tile == 0) {
    zero_gaps<T, kDim>(a.dq, a.in.q.starts, at.batch, a.in.batch, seq.first_q, seq.nq, a.in.queries,
                       a.in.heads, at.head);
  }
  const int first = tile * Own::kRows;
  if (first >= seq.nq) return;

  const Own own = {a, dropout, seq, at.batch, at.head, first, reinterpret_cast<T*>(shared)};
  const bool from_scores = kExtras && exact;
  if (a.dq || from_scores) own.load_queries();
  Row rows[2];
  if (from_scores) own.rows_of_scores(rows);
  own.keep_rows(from_scores, rows);
  if (a.dq) own.store_dq(rows);
}

}  // namespace

void attention_backward(const Context& context, const AttentionBackward& a) {
  const bool exact = a.in.dtype == DType::kFloat32 || (a.dbias && a.in.bias_dtype == DType::kFloat32);
  with_attention(a.in, [&]<class T, int kDim, bool kExtras>() {
    constexpr Tiles kTiles = dq_tiles(sizeof(T), kDim);
    const int64_t tiles = blocks_along(a.in.q, a.in.queries, a.in.longest_q, kTiles.rows);
    launch("attention_backward", context, attention_dq_kernel<T, kDim, kExtras>,
           tiles * a.in.heads * a.in.batch, kTiles.threads(), shared_bytes<T, kDim>(kTiles), a,
           DropoutScale(a.in.dropout), exact);
  });
  if (a.dk || a.dv) attention_dkv(context, a);
  if (a.dbias) attention_dbias(context, a);
}

}  // namespace fastlm
