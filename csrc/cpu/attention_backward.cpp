// attention, backward: a task is a chunk of the keys of one key head, for all query heads that read it. Tile by tile
// it recomputes p from lse, so that memory stays linear; dk and dv of a tile of keys are summed in scratch memory, dq
// in a buffer of the task, and the buffers of several chunks are added in their order. Bound by 10 * dim FLOPs a pair.
#include <vector>

#include "attention.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kKeys = 128, kQueries = 128;  // tiles: nine of them at 64 dims, 500 KB, stay in second-level cache
constexpr int64_t kGroup = 24;                  // rows at a time in a tile that the band cuts: skips what it excludes
constexpr int64_t kTasks = 32;                  // with fewer heads than this the keys are cut into chunks

// How the work is cut: by shape alone. Heads that share an element of dbias are one task's.
struct Split {
  int64_t batches, kv_heads, chunks, chunk;  // tasks along each axis; keys a chunk

  explicit Split(const AttentionBackward& f) {
    const AttentionInputs& a = f.in;
    const bool whole_keys = f.dbias && f.dbias_strides[3] == 0;
    batches = f.dbias && f.dbias_strides[0] == 0 ? std::min<int64_t>(1, a.batch) : a.batch;
    kv_heads = f.dbias && f.dbias_strides[1] == 0 ? 1 : a.kv_heads;
    const int64_t tiles = std::max<int64_t>(1, divide_up(a.keys, kKeys));
    const int64_t wanted = whole_keys ? 1 : std::min(tiles, divide_up(kTasks, std::max<int64_t>(1, batches * kv_heads)));
    chunk = divide_up(tiles, wanted) * kKeys;
    chunks = std::max<int64_t>(1, divide_up(a.keys, chunk));
  }
};

// One chunk's part of dq for the query heads of one key head: rows of queries that keep one of its keys.
struct Part {
  Range rows = {0, 0};
  Floats dq;
};

struct Tiles {
  int64_t dim_ld, value_ld, key_ld = padded(kKeys);
  Scratch scratch;
  float *k, *kt, *v, *vt, *q, *dout, *s, *dp, *dk, *dv, *scales, *derivative;

  explicit Tiles(const AttentionInputs& a)
      : dim_ld(padded(a.dim)), value_ld(padded(a.value_dim)), scratch(floats()) {
    k = scratch.take(kKeys * dim_ld);
    kt = scratch.take(dim_ld * key_ld);
    v = scratch.take(kKeys * value_ld);
    vt = scratch.take(value_ld * key_ld);
    q = scratch.take(kQueries * dim_ld);
    dout = scratch.take(kQueries * value_ld);
    s = scratch.take(kQueries * key_ld);
    dp = scratch.take(kQueries * key_ld);
    dk = scratch.take(kKeys * dim_ld);
    dv = scratch.take(kKeys * value_ld);
    scales = scratch.take(kKeys + kPhiloxNumbers);
    derivative = scratch.take(kKeys);
  }

  int64_t floats() const {
    const int64_t dims = dim_ld + value_ld;
    return (2 * kKeys + kQueries) * dims + key_ld * dims + 2 * kQueries * key_ld + 2 * kKeys + kPhiloxNumbers;
  }
};

// One query head against one tile of keys.
struct Head {
  const AttentionBackward& f;
  const Scores& scores;
  const Band& band;
  const float *lse, *lse_rest, *delta;  // [queries]: delta_i = dout_i . out_i - dlse_i
  float* dbias;
  float* dq;  // row `first` of this head's part
  int64_t first;
};

void add_dbias(const Head& h, int64_t i, int64_t j, int64_t n, const float* ds) {
  const int64_t stride = h.f.dbias_strides[3];
  float* to = h.dbias + i * h.f.dbias_strides[2] + j * stride;
  if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] += ds[c];
    return;
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += ds[c];
  *to += sum;
}

// s = scale * q . k becomes p (dropped), dp becomes ds; both 0 outside the keys that query i keeps.
void gradient_row(const Head& h, Tiles& t, int64_t i, Range cols, float* s, float* dp) {
  const int64_t n = cols.end - cols.begin;
  const Range row = intersection(h.band.keys_of({i, i + 1}), cols);
  const bool attends = !row.empty() && h.lse[i] != -INFINITY;
  const Range kept = attends ? Range{row.begin - cols.begin, row.end - cols.begin} : Range{0, 0};
  h.scores.adjust(i, cols.begin + kept.begin, kept.end - kept.begin, s + kept.begin, t.derivative + kept.begin);
  const Range whole = whole_vectors(kept, -INFINITY, s);
  const float lse = h.lse[i], rest = h.lse_rest[i], delta = h.delta[i];
  if (h.scores.drops()) {
    h.scores.dropout(i, cols.begin + whole.begin, whole.end - whole.begin, t.scales);
    const float* scales = t.scales - whole.begin;
#pragma omp simd
    for (int64_t c = whole.begin; c < whole.end; ++c) {
      const float p = exp(s[c] - lse - rest);
      s[c] = p * scales[c];
      dp[c] = p * (dp[c] * scales[c] - delta);
    }
  } else {
#pragma omp simd
    for (int64_t c = whole.begin; c < whole.end; ++c) {
      const float p = exp(s[c] - lse - rest);
      s[c] = p;
      dp[c] = p * (dp[c] - delta);
    }
  }
  if (h.dbias) add_dbias(h, i, cols.begin + kept.begin, kept.end - kept.begin, dp + kept.begin);
  if (h.scores.capped()) {
    for (int64_t c = kept.begin; c < kept.end; ++c) dp[c] *= t.derivative[c];
  }
  for (float* values : {s, dp}) {
    for (int64_t c = 0; c < whole.begin; ++c) values[c] = 0;
    for (int64_t c = whole.end; c < n; ++c) values[c] = 0;
  }
}

// p and ds of some queries, and their dq.
void query_group(const Head& h, Tiles& t, int64_t tile_begin, Range rows, Range cols) {
  const AttentionInputs& a = h.f.in;
  const int64_t r0 = rows.begin - tile_begin, count = rows.end - rows.begin;
  const Range kept = intersection(h.band.keys_of(rows), cols);
  float *s = t.s + r0 * t.key_ld, *dp = t.dp + r0 * t.key_ld;
  if (!kept.empty()) {
    const int64_t begin = round_down(kept.begin - cols.begin, kLine), n = kept.end - cols.begin - begin;
    const Left q = {t.q + r0 * t.dim_ld, t.dim_ld, 1}, dout = {t.dout + r0 * t.value_ld, t.value_ld, 1};
    multiply(false, count, n, a.dim, q, t.kt + begin, t.key_ld, s + begin, t.key_ld);
    multiply(false, count, n, a.value_dim, dout, t.vt + begin, t.key_ld, dp + begin, t.key_ld);
  }
  for (int64_t r = 0; r < count; ++r) {
    gradient_row(h, t, rows.begin + r, cols, s + r * t.key_ld, dp + r * t.key_ld);
  }
  if (!h.f.dq || kept.empty()) return;
  const int64_t begin = kept.begin - cols.begin;
  multiply(true, count, a.dim, kept.end - kept.begin, {dp + begin, t.key_ld, 1}, t.k + begin * t.dim_ld, t.dim_ld,
           h.dq + (rows.begin - h.first) * t.dim_ld, t.dim_ld);
}

// dk and dv of some keys from the tile's p and ds, read as their transposes.
void key_group(const Head& h, Tiles& t, Range rows, Range group, Range cols) {
  const AttentionInputs& a = h.f.in;
  const Range kept = intersection(h.band.queries_of(group), rows);
  if (kept.empty()) return;
  const int64_t r0 = kept.begin - rows.begin, c0 = group.begin - cols.begin;
  const int64_t count = group.end - group.begin, depth = kept.end - kept.begin, start = r0 * t.key_ld + c0;
  if (h.f.dv) {
    multiply(true, count, a.value_dim, depth, {t.s + start, 1, t.key_ld}, t.dout + r0 * t.value_ld, t.value_ld,
             t.dv + c0 * t.value_ld, t.value_ld);
  }
  if (h.f.dk) {
    multiply(true, count, a.dim, depth, {t.dp + start, 1, t.key_ld}, t.q + r0 * t.dim_ld, t.dim_ld,
             t.dk + c0 * t.dim_ld, t.dim_ld);
  }
}

void head_against_keys(const Head& h, Tiles& t, int64_t batch, int64_t head, Range cols) {
  const AttentionInputs& a = h.f.in;
  const Range queries = h.band.queries_of(cols);
  for (int64_t i = queries.begin; i < queries.end; i += kQueries) {
    const Range rows = {i, std::min(queries.end, i + kQueries)};
    const int64_t step = h.band.covers(rows, cols) ? kQueries : kGroup;
    load_rows(a.dtype, a.q, batch, head, rows, a.dim, a.scale, t.q);
    if (h.f.dout.data) {
      load_rows(a.dtype, h.f.dout, batch, head, rows, a.value_dim, 1, t.dout);
    } else {
      std::fill(t.dout, t.dout + kQueries * t.value_ld, 0.0f);
    }
    for (int64_t r = rows.begin; r < rows.end; r += step) {
      query_group(h, t, rows.begin, {r, std::min(rows.end, r + step)}, cols);
    }
    for (int64_t c = cols.begin; c < cols.end; c += step) {
      key_group(h, t, rows, {c, std::min(cols.end, c + step)}, cols);
    }
  }
}

// One tile of keys: all query heads that read it, then its dk and dv. Keys past kv_lengths get zeros.
void key_tile(const AttentionBackward& f, const float* delta, Tiles& t, const Part& part, int64_t batch, int64_t kv_head,
              Range all) {
  const AttentionInputs& a = f.in;
  const Band band = band_of(a, batch);
  const Range cols = intersection(all, {0, band.keys});
  const int64_t group = a.heads / a.kv_heads, part_rows = part.rows.end - part.rows.begin;
  std::fill(t.dk, t.dk + kKeys * t.dim_ld, 0.0f);
  std::fill(t.dv, t.dv + kKeys * t.value_ld, 0.0f);
  if (!cols.empty()) {
    load_rows(a.dtype, a.k, batch, kv_head, cols, a.dim, 1, t.k);
    load_rows(a.dtype, a.v, batch, kv_head, cols, a.value_dim, 1, t.v);
    transpose_tile(t.k, cols.end - cols.begin, a.dim, t.kt, t.key_ld);
    transpose_tile(t.v, cols.end - cols.begin, a.value_dim, t.vt, t.key_ld);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g, row = (batch * a.heads + head) * a.queries;
      const Scores scores(a, batch, head);
      float* dbias = f.dbias ? f.dbias + batch * f.dbias_strides[0] + head * f.dbias_strides[1] : nullptr;
      float* dq = part.dq.get() + g * part_rows * t.dim_ld;
      const Head h = {f, scores, band, f.lse + row, f.lse_rest + row, delta + row, dbias, dq, part.rows.begin};
      head_against_keys(h, t, batch, head, cols);
    }
  }
  // q was loaded times scale, so dk needs no factor.
  if (f.dk) store_rows(a.dtype, t.dk, a.kv_heads, a.keys, batch, kv_head, all, a.dim, 1, f.dk);
  if (f.dv) store_rows(a.dtype, t.dv, a.kv_heads, a.keys, batch, kv_head, all, a.value_dim, 1, f.dv);
}

// dq of some queries of one head: the parts of all chunks, added in their order.
void store_dq(const AttentionBackward& f, const Part* parts, int64_t chunks, int64_t batch, int64_t head, Range rows,
              float* tile) {
  const AttentionInputs& a = f.in;
  const int64_t ld = padded(a.dim), g = head % (a.heads / a.kv_heads);
  std::fill(tile, tile + (rows.end - rows.begin) * ld, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Part& part = parts[chunk];
    const Range both = intersection(part.rows, rows);
    if (both.empty()) continue;
    const float* from = part.dq.get() + (g * (part.rows.end - part.rows.begin) + both.begin - part.rows.begin) * ld;
    float* to = tile + (both.begin - rows.begin) * ld;
#pragma omp simd
    for (int64_t c = 0; c < (both.end - both.begin) * ld; ++c) to[c] += from[c];
  }
  store_rows(a.dtype, tile, a.heads, a.queries, batch, head, rows, a.dim, a.scale, f.dq);
}

void backward_chunk(const AttentionBackward& f, const Split& split, const float* delta, int64_t batch, int64_t kv_head,
                    Range keys, Part& part) {
  const AttentionInputs& a = f.in;
  const int64_t group = a.heads / a.kv_heads;
  Tiles t(a);
  part.rows = band_of(a, batch).queries_of(keys);
  if (f.dq && !part.rows.empty()) {
    const int64_t count = group * (part.rows.end - part.rows.begin) * t.dim_ld;
    part.dq = make_floats(count);
    std::fill(part.dq.get(), part.dq.get() + count, 0.0f);
  }
  for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
    key_tile(f, delta, t, part, batch, kv_head, {j, std::min(keys.end, j + kKeys)});
  }
  if (!f.dq || split.chunks > 1) return;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i = 0; i < a.queries; i += kQueries) {
      store_dq(f, &part, 1, batch, head, {i, std::min(a.queries, i + kQueries)}, t.q);
    }
  }
  part.dq.reset();
}

// delta_i = dout_i . out_i - dlse_i for every query: the diagonals of small products, so that it is rounded as the tiles'
// dp are. A query with one key, whose out is v, then gets exactly the gradient 0 that it should.
Floats make_delta(const Context& context, const AttentionBackward& f, DType out_dtype, const Heads& out) {
  const AttentionInputs& a = f.in;
  const int64_t ld = padded(a.value_dim), blocks = divide_up(a.queries, kQueries);
  Floats delta = make_floats(a.batch * a.heads * a.queries);
  parallel_tasks(context, a.batch * a.heads * blocks, [&](int64_t index) {
    const int64_t batch = index / blocks / a.heads, head = index / blocks % a.heads, first = index % blocks * kQueries;
    const int64_t last = std::min(a.queries, first + kQueries), row = (batch * a.heads + head) * a.queries;
    Scratch scratch((2 * kLanes + kLine) * ld + kLanes * kLanes);
    float *x = scratch.take(kLanes * ld), *y = scratch.take(kLanes * ld), *yt = scratch.take(kLine * ld);
    float* products = scratch.take(kLanes * kLanes);
    for (int64_t i = first; i < last; i += kLanes) {
      const Range rows = {i, std::min(last, i + kLanes)};
      const int64_t count = rows.end - rows.begin;
      if (f.dout.data) {
        load_rows(a.dtype, f.dout, batch, head, rows, a.value_dim, 1, x);
        load_rows(out_dtype, out, batch, head, rows, a.value_dim, 1, y);
        transpose_tile(y, count, a.value_dim, yt, kLine);
        multiply(false, count, count, a.value_dim, {x, ld, 1}, yt, kLine, products, kLanes);
      }
      for (int64_t r = 0; r < count; ++r) {
        const float product = f.dout.data ? products[r * kLanes + r] : 0;
        delta[row + i + r] = product - (f.dlse ? f.dlse[row + i + r] : 0);
      }
    }
  });
  return delta;
}

// out in float32. The gradient of a float32 bias would show the rounding of a half-precision one: it is a small
// difference of dp and dout . out.
Floats make_out(const Context& context, const AttentionBackward& f) {
  const AttentionInputs& a = f.in;
  const int64_t rows = a.batch * a.heads * a.queries;
  Floats out = make_floats(rows * a.value_dim), sums = make_floats(2 * rows);
  attention_forward(context, {a, DType::kFloat32, out.get(), sums.get(), sums.get() + rows});
  return out;
}

}  // namespace

void attention_backward(const Context& context, const AttentionBackward& f) {
  const AttentionInputs& a = f.in;
  const Split split(f);
  const bool precise = f.dbias && a.dtype != DType::kFloat32;
  const Floats out = precise ? make_out(context, f) : nullptr;
  const Heads wide = {out.get(), a.queries * a.heads * a.value_dim, a.value_dim, a.heads * a.value_dim};
  const Floats delta = make_delta(context, f, precise ? DType::kFloat32 : a.dtype, precise ? wide : f.out);
  const int64_t groups = split.batches * split.kv_heads, batches = a.batch / std::max<int64_t>(1, split.batches);
  const int64_t kv_heads = a.kv_heads / split.kv_heads;
  std::vector<Part> parts(static_cast<size_t>(a.batch * a.kv_heads * split.chunks));
  parallel_tasks(context, groups * split.chunks, [&](int64_t index) {
    // The first keys first: with a causal band they have the most queries.
    const int64_t chunk = index / groups, group = index % groups;
    const Range keys = {chunk * split.chunk, std::min(a.keys, (chunk + 1) * split.chunk)};
    const int64_t b0 = group / split.kv_heads * batches, h0 = group % split.kv_heads * kv_heads;
    for (int64_t batch = b0; batch < b0 + batches; ++batch) {
      for (int64_t head = h0; head < h0 + kv_heads; ++head) {
        Part& part = parts[static_cast<size_t>((batch * a.kv_heads + head) * split.chunks + chunk)];
        backward_chunk(f, split, delta.get(), batch, head, keys, part);
      }
    }
  });
  if (!f.dq || split.chunks == 1) return;
  const int64_t pieces = divide_up(a.queries, kQueries);
  parallel_tasks(context, a.batch * a.heads * pieces, [&](int64_t index) {
    const int64_t i = index % pieces * kQueries, head = index / pieces % a.heads, batch = index / pieces / a.heads;
    const int64_t first = (batch * a.kv_heads + head / (a.heads / a.kv_heads)) * split.chunks;
    Scratch scratch(kQueries * padded(a.dim));
    store_dq(f, &parts[static_cast<size_t>(first)], split.chunks, batch, head, {i, std::min(a.queries, i + kQueries)},
             scratch.take(kQueries * padded(a.dim)));
  });
}

}  // namespace fastlm
