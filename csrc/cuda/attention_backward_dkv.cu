// attention, backward: dk and dv.
//
// A block has 64 or 128 keys of a key head; the queries that see them come by, of all query heads that read
// it. p and ds are transposed, so that a warp's rows are keys.
#include "attention_backward.cuh"

namespace fastlm {
namespace {

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

// One block: its keys from `first` on, in shared memory from of_k on, and the queries that see them.
template <class T, int kDim, bool kExtras>
struct DkvBlock {
  static constexpr Tiles kTiles = dkv_tiles(sizeof(T), kDim);
  static constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  static constexpr int kRowPitch = kPitch<T, kDim>, kCols = kDim / kTiles.split;

  const AttentionBackward& a;
  const DropoutScale& dropout;
  const Sequence& seq;
  int b, kv_head, first, written;  // written: keys that have a gradient
  T* of_k;
  T* of_v = of_k + kRows * kRowPitch;
  T* of_q = of_v + kRows * kRowPitch;
  T* of_dout = of_q + kTiles.stages * kStep * kRowPitch;
  int of_row = static_cast<int>(threadIdx.x / 32) % (kRows / 16);  // this warp's 16, and its columns
  int col0 = static_cast<int>(threadIdx.x / 32) / (kRows / 16) * kCols;
  int j0 = first + of_row * 16;
  T* own_k = of_k + of_row * 16 * kRowPitch;
  T* own_v = of_v + of_row * 16 * kRowPitch;
  Span queries = queries_of(seq, first, kRows, kStep);
  int steps = queries.steps(kStep);                          // of a head
  int group = static_cast<int>(a.in.heads / a.in.kv_heads);  // heads

  __device__ void load_keys() const {
    copy_rows_async<T, kRows, kDim, kThreads>(of_k, matrix_of<T>(a.in.k, b, kv_head, seq.first_k), first,
                                              seq.nk);
    copy_rows_async<T, kRows, kDim, kThreads>(of_v, matrix_of<T>(a.in.v, b, kv_head, seq.first_k), first,
                                              seq.nk);
  }

  __device__ void load(int h, int i0, int stage) const {
    const int place = stage * kStep * kRowPitch;
    copy_rows_async<T, kStep, kDim, kThreads>(of_q + place, matrix_of<T>(a.in.q, b, h, seq.first_q), i0,
                                              seq.nq);
    copy_rows_async<T, kStep, kDim, kThreads>(of_dout + place, matrix_of<T>(a.dout, b, h, seq.first_q), i0,
                                              a.dout.data ? seq.nq : 0);
  }

  // Adds what queries from i0 on of a head give.
  __device__ void add(int h, int i0, int stage, Sums<kCols>& dk, Sums<kCols>& dv) const {
    const Head head = head_of(a.in, b, h);
    const Columns<kStep> columns(a, seq, first_row(a.in, seq, b, h), i0);
    const T* const of_queries = of_q + stage * kStep * kRowPitch;
    const T* const douts = of_dout + stage * kStep * kRowPitch;
    Sums<kStep> p, bends, dp;
    set_zero<kStep>(p);
    add_product_of_rows<T, kStep, kDim>(p, own_k, of_queries);
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
    add_product<T, kCols, kStep, kRowPitch>(dk, ds, of_queries + col0);
  }

  __device__ void add_all(Sums<kCols>& dk, Sums<kCols>& dv) const {
    const auto head_at = [&](int step) { return kv_head * group + step / steps; };
    const auto query_at = [&](int step) { return queries.begin + step % steps * kStep; };
    const auto load_step = [&](int step, int stage) { load(head_at(step), query_at(step), stage); };
    walk<kTiles.stages>(steps * group, load_step, [&](int step, int stage) {
      const int i0 = query_at(step);
      if (seq.sees(i0, i0 + kStep - 1, j0, j0 + 15)) add(head_at(step), i0, stage, dk, dv);
    });
  }

  // Writes a warp's rows of dk or dv, by way of its own keys or values; to: may be null.
  __device__ void store(const Sums<kCols>& sums, float scale, T* staging, void* to) const {
    if (j0 >= written || !to) return;
    const int64_t stride = a.in.kv_heads * kDim;
    const int64_t place = (seq.first_k + j0) * stride + kv_head * kDim + col0;
    const float scales[2] = {scale, scale};
    store_tile<T, kCols, kRowPitch>(sums, scales, staging + col0, static_cast<T*>(to) + place, stride,
                                    written - j0);
  }
};

template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(dkv_tiles(sizeof(T), kDim).threads(), 1)
    attention_dkv_kernel(const AttentionBackward a, const DropoutScale dropout) {
  using Own = DkvBlock<T, kDim, kExtras>;
  extern __shared__ uint4 shared[];
  const int tiles = static_cast<int>(blocks_along(a.in.k, a.in.keys, a.in.longest_k, Own::kRows));
  const Block at(tiles, a.in.kv_heads);
  const Sequence seq = sequence_of(a.in, at.batch);
  if (a.in.k.starts && at.tile == 0) {
    for (void* to : {a.dk, a.dv}) {
      zero_gaps<T, kDim>(to, a.in.k.starts, at.batch, a.in.batch, seq.first_k, seq.nk, a.in.keys,
                         a.in.kv_heads, at.head);
    }
  }
  const int first = at.tile * Own::kRows, written = a.in.k.starts ? seq.nk : static_cast<int>(a.in.keys);
  if (first >= written) return;

  const Own own = {a, dropout, seq, at.batch, at.head, first, written, reinterpret_cast<T*>(shared)};
  own.load_keys();
  Sums<Own::kCols> dk, dv;
  set_zero<Own::kCols>(dk);
  set_zero<Own::kCols>(dv);
  own.add_all(dk, dv);
  own.store(dk, a.in.scale, own.own_k, a.dk);
  own.store(dv, 1, own.own_v, a.dv);
}

}  // namespace

void attention_dkv(const Context& context, const AttentionBackward& a) {
  with_attention(a.in, [&]<class T, int kDim, bool kExtras>() {
    constexpr Tiles kTiles = dkv_tiles(sizeof(T), kDim);
    const int64_t tiles = blocks_along(a.in.k, a.in.keys, a.in.longest_k, kTiles.rows);
    launch("attention_backward", context, attention_dkv_kernel<T, kDim, kExtras>,
           tiles * a.in.kv_heads * a.in.batch, kTiles.threads(), shared_bytes<T, kDim>(kTiles), a,
           DropoutScale(a.in.dropout));
  });
}

}  // namespace fastlm
