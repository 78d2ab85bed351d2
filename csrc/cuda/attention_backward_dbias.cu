// attention, backward: the gradient of a bias.
//
// A block has a tile of bias, and walks along all that it is broadcast to.
#include "attention_backward.cuh"

namespace fastlm {
namespace {

// Rows are queries, a step keys: of bias, a tile.
__host__ __device__ constexpr Tiles dbias_tiles(int bytes, int dim) {
  if (bytes == 4 && dim > 128) return {32, 16, 2, 1, 1};  // 98 KB
  return {64, 32, 4, 1, 1};                               // 99 KB at 128 of float32, at 256 of half precision
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

// One block: the tile of bias that it has; rows of queries and keys in shared memory from of_q on.
template <class T, int kDim>
struct DbiasBlock {
  static constexpr Tiles kTiles = dbias_tiles(sizeof(T), kDim);
  static constexpr int kRows = kTiles.rows, kStep = kTiles.step, kThreads = kTiles.threads();
  static constexpr int kRowPitch = kPitch<T, kDim>;

  const AttentionBackward& a;
  const DropoutScale& dropout;
  const BiasTiles& tiles;
  T* of_q;
  T* of_dout = of_q + kRows * kRowPitch;
  T* of_k = of_dout + kRows * kRowPitch;
  T* of_v = of_k + kStep * kRowPitch;
  int tile_col = static_cast<int>(blockIdx.x % tiles.cols);
  int tile_row = static_cast<int>(blockIdx.x / tiles.cols % tiles.rows);
  int64_t own_h = blockIdx.x / tiles.cols / tiles.rows % tiles.heads;
  int64_t own_b = blockIdx.x / tiles.cols / tiles.rows / tiles.heads;
  int warp_row = static_cast<int>(threadIdx.x / 32) * 16;

  __device__ void load(const Sequence& seq, int64_t b, int64_t h, int i0, int j0) const {
    const int64_t kv_head = h / (a.in.heads / a.in.kv_heads);
    const Matrix<T> dout = matrix_of<T>(a.dout, b, h, 0);
    copy_rows_async<T, kRows, kDim, kThreads>(of_q, matrix_of<T>(a.in.q, b, h, 0), i0, seq.nq);
    copy_rows_async<T, kRows, kDim, kThreads>(of_dout, dout, i0, a.dout.data ? seq.nq : 0);
    copy_rows_async<T, kStep, kDim, kThreads>(of_k, matrix_of<T>(a.in.k, b, kv_head, 0), j0, seq.nk);
    copy_rows_async<T, kStep, kDim, kThreads>(of_v, matrix_of<T>(a.in.v, b, kv_head, 0), j0, seq.nk);
    commit_copies();
    wait_for_copies<0>();
  }

  // ds of this warp's 16 queries from i on.
  __device__ void gradients(const Sequence& seq, const Head& head, int64_t b, int64_t h, int i, int j0,
                            Sums<kStep>& ds) const {
    const int64_t row0 = first_row(a.in, seq, b, h) + i + lane_row();
    const Row rows[2] = {kept_row(a, row0, i + lane_row() < seq.nq),
                         kept_row(a, row0 + 8, i + lane_row() + 8 < seq.nq)};
    const auto row = [&](int, int e) { return rows[e / 2]; };
    set_zero<kStep>(ds);
    add_product_of_rows<T, kStep, kDim>(ds, of_q + warp_row * kRowPitch, of_k);
    to_weights<false, true, kStep>(a.in, head, seq, i, j0, ds, nullptr, row);
    Sums<kStep> dp;
    set_zero<kStep>(dp);
    add_product_of_rows<T, kStep, kDim>(dp, of_dout + warp_row * kRowPitch, of_v);
    if (dropout.seed) {
      drop<kStep>(dp, survivors<false, kStep>(dropout, head.number, i, j0), dropout.scale);
    }
    to_gradients<kStep>(ds, dp, row);
  }

  // Adds what a head gives, of all tiles that this one of bias is broadcast to.
  __device__ void add_head(int64_t b, int64_t h, LongSums<kStep>& sums) const {
    const Sequence seq = sequence_of(a.in, b);
    const Head head = head_of(a.in, b, h);
    const int end_i = static_cast<int>(tiles.sums_rows ? a.in.queries : (tile_row + 1) * kRows);
    const int end_j = static_cast<int>(tiles.sums_cols ? a.in.keys : (tile_col + 1) * kStep);
    for (int i0 = tile_row * kRows; i0 < end_i; i0 += kRows) {
      for (int j0 = tile_col * kStep; j0 < end_j; j0 += kStep) {
        if (!seq.sees(i0, i0 + kRows - 1, j0, j0 + kStep - 1)) continue;
        __syncthreads();  // the tiles before are no longer needed
        load(seq, b, h, i0, j0);
        __syncthreads();
        const int i = i0 + warp_row;
        if (!seq.sees(i, i + 15, j0, j0 + kStep - 1)) continue;
        Sums<kStep> ds;
        gradients(seq, head, b, h, i, j0, ds);
        sums.add(ds);
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(dbias_tiles(sizeof(T), kDim).threads(), 1)
    attention_dbias_kernel(const AttentionBackward a, const DropoutScale dropout) {
  using Own = DbiasBlock<T, kDim>;
  constexpr int kRows = Own::kRows, kStep = Own::kStep;
  extern __shared__ uint4 shared[];
  const BiasTiles tiles(a, dbias_tiles(sizeof(T), kDim));
  const Own own = {a, dropout, tiles, reinterpret_cast<T*>(shared)};
  const int64_t over_h = a.in.heads / tiles.heads, over_b = a.in.batch / tiles.batch;
  LongSums<kStep> sums;
  for (int64_t of = 0; of < over_b * over_h; ++of) {
    own.add_head(own.own_b + of / over_h, own.own_h + of % over_h, sums);
  }
  __syncthreads();
  store_bias<kRows, kStep, Own::kThreads>(a, tiles, reinterpret_cast<float*>(shared), sums.sum, own.own_b,
                                          own.own_h, own.tile_row * kRows, own.tile_col * kStep);
}

}  // namespace

void attention_dbias(const Context& context, const AttentionBackward& a) {
  with_attention(a.in, [&]<class T, int kDim, bool kExtras>() {
    if constexpr (kExtras) {  // a bias is one of them
      constexpr Tiles kTiles = dbias_tiles(sizeof(T), kDim);
      const BiasTiles tiles(a, kTiles);
      launch("attention_backward", context, attention_dbias_kernel<T, kDim>,
             tiles.batch * tiles.heads * tiles.rows * tiles.cols, kTiles.threads(),
             shared_bytes<T, kDim>(kTiles), a, DropoutScale(a.in.dropout));
    }
  });
}

}  // namespace fastlm
