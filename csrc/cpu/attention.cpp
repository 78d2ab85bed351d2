// attention, forward: a task is a block of queries of one head. It walks over tiles of keys with the
// softmax's running maximum and sum (Milakov, Gimelshein, https://arxiv.org/abs/1805.02867; Dao et al.,
// https://arxiv.org/abs/2205.14135), so that no more than a few rows of scores exist. Bound by 4 * dim FLOPs
// a pair.
#include "attention.h"

#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kKeys =
    256;  // a tile of keys: K^T and V of 64 dims, 140 KB, stay in the second-level cache
constexpr int64_t kRows =
    48;  // queries at a time: their scores, 52 KB, are still near when the softmax comes
constexpr int64_t kBlock = 528;  // queries a task: they share the packing of a tile of keys
constexpr int64_t kTasks = 32;   // with fewer blocks than this they are cut smaller

// The blocks of all sequences: each is a task for every head.
std::vector<Block> blocks_of(const AttentionInputs& a) {
  double total = 0;
  for (int64_t batch = 0; batch < a.batch; ++batch) total += pairs_of(a, batch);
  std::vector<Block> blocks;
  for (int64_t batch = 0; batch < a.batch; ++batch) {
    const Band band = band_of(a, batch);
    const int64_t pieces = share_of(pairs_of(a, batch), total * static_cast<double>(a.heads), kTasks);
    const int64_t size = std::clamp(round_up(divide_up(band.queries, pieces), kRows), kRows, kBlock);
    if (band.queries > 0) cut_sequence(band, batch, size, blocks);
  }
  sort_blocks(blocks);
  return blocks;
}

struct Tiles {
  int64_t dim_ld, value_ld, key_ld = padded(kKeys);
  Scratch scratch;
  float *q, *out, *k, *kt, *v, *s, *maximum, *sum;
  Rows values;  // of a tile of keys

  Tiles(const AttentionInputs& a, int64_t block)
      : dim_ld(padded(a.dim)), value_ld(padded(a.value_dim)), scratch(floats(block)) {
    q = scratch.take(block * dim_ld);
    out = scratch.take(block * value_ld);
    k = scratch.take(kKeys * dim_ld);
    kt = scratch.take(dim_ld * key_ld);
    v = scratch.take(kKeys * value_ld);
    s = scratch.take(kRows * key_ld);
    maximum = scratch.take(block);
    sum = scratch.take(block);
  }

  int64_t floats(int64_t block) const {
    return (block + kKeys) * (dim_ld + value_ld) + dim_ld * key_ld + kRows * key_ld +
           2 * round_up(block, kLine);
  }
};

// s becomes exp(s - maximum), dropped, over whole vectors of keys; `sum` and `out` follow the new maximum.
void softmax_row(const Scores& scores, int64_t i, int64_t j, Range kept, float* s, float& maximum, float& sum,
                 float* out, int64_t out_cols) {
  scores.adjust(i, j + kept.begin, kept.end - kept.begin, s + kept.begin, nullptr);
  const Range whole = whole_vectors(kept, -INFINITY, s);
  const float before = maximum;
  float top = before;
#pragma omp simd reduction(max : top)
  for (int64_t c = whole.begin; c < whole.end; ++c) top = s[c] > top ? s[c] : top;
  maximum = top;
  const float shift = top == -INFINITY ? 0 : top;
  float added = 0;
#pragma omp simd reduction(+ : added)
  for (int64_t c = whole.begin; c < whole.end; ++c) {
    s[c] = exp_nonpositive(s[c] - shift);
    added += s[c];
  }
  if (top != before) {
    const float factor = exp(before - shift);
    sum *= factor;
#pragma omp simd
    for (int64_t c = 0; c < out_cols; ++c) out[c] *= factor;
  }
  sum += added;
  if (!scores.drops()) return;
  float scales[kKeys + kPhiloxNumbers];
  scores.dropout(i, j + whole.begin, whole.end - whole.begin, scales);
#pragma omp simd
  for (int64_t c = whole.begin; c < whole.end; ++c) s[c] *= scales[c - whole.begin];
}

// Queries `rows` against the tile of keys `cols`; `first` is the first query of the block.
void forward_rows(const AttentionInputs& a, const Scores& scores, const Band& band, Tiles& t, int64_t first,
                  Range rows, Range cols) {
  const Range kept = intersection(band.keys_of(rows), cols);
  if (kept.empty()) return;
  const Range tile = {kept.begin - cols.begin, kept.end - cols.begin};
  const int64_t whole = round_down(tile.begin, kLine), count = rows.end - rows.begin, r0 = rows.begin - first;
  float* out = t.out + r0 * t.value_ld;
  multiply(false, count, tile.end - whole, a.dim, {t.q + r0 * t.dim_ld, t.dim_ld, 1}, t.kt + whole, t.key_ld,
           t.s + whole, t.key_ld);
  for (int64_t r = 0; r < count; ++r) {
    float* s = t.s + r * t.key_ld;
    const int64_t i = rows.begin + r;
    const Range row = intersection(band.keys_of({i, i + 1}), kept);
    Range own = {row.begin - cols.begin, row.end - cols.begin};
    if (row.empty()) {
      std::fill(s + tile.begin, s + tile.end, 0.0f);
      continue;
    }
    softmax_row(scores, i, cols.begin, own, s, t.maximum[r0 + r], t.sum[r0 + r], out + r * t.value_ld,
                a.value_dim);
    own = {round_down(own.begin, kLine), round_up(own.end, kLine)};
    for (int64_t c = tile.begin; c < own.begin; ++c) s[c] = 0;
    for (int64_t c = own.end; c < tile.end; ++c) s[c] = 0;
  }
  multiply(true, count, a.value_dim, tile.end - tile.begin, {t.s + tile.begin, t.key_ld, 1},
           t.values.data + tile.begin * t.values.ld, t.values.ld, out, t.value_ld);
}

void finish(const AttentionForward& f, int64_t batch, int64_t head, Range block, Tiles& t) {
  const AttentionInputs& a = f.in;
  const int64_t row = first_statistic(a, batch, head);
  for (int64_t i = block.begin; i < block.end; ++i) {
    const int64_t r = i - block.begin;
    const bool empty = t.sum[r] == 0;
    const float factor = 1 / t.sum[r];
    f.lse[row + i] = empty ? -INFINITY : t.maximum[r] + std::log(t.sum[r]);
    float* out = t.out + r * t.value_ld;
#pragma omp simd
    for (int64_t c = 0; c < a.value_dim; ++c) out[c] = empty ? 0 : out[c] * factor;
  }
  store_rows(a.dtype, t.out, a.heads, first_row(a.q, batch, a.queries), head, block, a.value_dim, 1, f.out);
}

void forward_block(const AttentionForward& f, int64_t batch, int64_t head, Range block) {
  const AttentionInputs& a = f.in;
  const Scores scores(a, batch, head);
  const Band band = band_of(a, batch);
  const int64_t kv_head = head / (a.heads / a.kv_heads), count = block.end - block.begin;
  Tiles t(a, round_up(count, 4));
  load_rows(a.dtype, a.q, batch, head, block, a.dim, t.q);
  std::fill(t.out, t.out + count * t.value_ld, 0.0f);
  std::fill(t.maximum, t.maximum + count, -INFINITY);
  std::fill(t.sum, t.sum + count, 0.0f);
  const Range keys = band.keys_of(block);
  for (int64_t j = round_down(std::max<int64_t>(0, keys.begin), kKeys); j < keys.end; j += kKeys) {
    const Range cols = {j, std::min(band.keys, j + kKeys)};
    transpose_tile(rows_of(count, a.dtype, a.k, batch, kv_head, cols, a.dim, t.k), cols.end - cols.begin,
                   a.dim, t.kt, t.key_ld);
    t.values = rows_of(count, a.dtype, a.v, batch, kv_head, cols, a.value_dim, t.v);
    for (int64_t i = block.begin; i < block.end; i += kRows) {
      forward_rows(a, scores, band, t, block.begin, {i, std::min(block.end, i + kRows)}, cols);
    }
  }
  finish(f, batch, head, block, t);
}

}  // namespace

void attention_forward(const Context& context, const AttentionForward& f) {
  parallel_blocks(context, f.in, blocks_of(f.in), f.in.heads, 1, [&](const Block& block, int64_t head) {
    forward_block(f, block.batch, head, block.queries);
  });
}

}  // namespace fastlm
