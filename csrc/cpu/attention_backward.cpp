// attention, backward: a task is a chunk of the queries of all query heads that read one key head. A few
// queries at a time it holds their scores and dp for all keys, so that memory stays linear and the softmax's
// backward is the plain one: sum_j p_ij dp_ij is taken from the very dp that it is subtracted from (dout .
// out, which would save a pass, is rounded otherwise: 2.5 times the error was seen where one key has most of
// the weight). dk and dv are summed in the task's own buffers; those of several chunks are added in their
// order. Bound by 10 * dim FLOPs a pair.
#include <vector>

#include "attention.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kKeys = 256;  // a packed tile of K^T or V^T
constexpr int64_t kRows = 72;   // queries at a time: their scores and dp for 1024 keys are 600 KB
constexpr int64_t kGroup =
    24;  // rows or keys at a time along the band's edges: skips most of what is outside
constexpr int64_t kTasks = 16;   // with fewer heads than this the queries are cut into chunks
constexpr int64_t kChunk = 256;  // at least so many queries each, so that packing the keys stays a small part

// How the work is cut: by shape alone. Heads and queries that share an element of dbias are one task's.
struct Split {
  int64_t batches, kv_heads, chunks, chunk;  // tasks along each axis; queries a chunk

  explicit Split(const AttentionBackward& f) {
    const AttentionInputs& a = f.in;
    batches = f.dbias && f.dbias_strides[0] == 0 ? std::min<int64_t>(1, a.batch) : a.batch;
    kv_heads = f.dbias && f.dbias_strides[1] == 0 ? 1 : a.kv_heads;
    const bool whole = f.dbias && f.dbias_strides[2] == 0;
    const int64_t wanted = whole ? 1 : divide_up(kTasks, std::max<int64_t>(1, batches * kv_heads));
    chunks = std::clamp<int64_t>(divide_up(a.queries, kChunk), 1, wanted);
    chunk = divide_up(a.queries, chunks);
  }
};

// One chunk's part of dk and dv of one key head: rows of keys that its queries keep.
struct Part {
  Range keys = {0, 0};
  Floats dk, dv;
};

struct Tiles {
  int64_t dim_ld, value_ld, key_ld = padded(kKeys), keys, row_ld;
  Scratch scratch;
  float *k, *kt, *v, *vt, *q, *dout, *dq, *s, *dp, *scales, *derivative, *dbias;

  Tiles(const AttentionInputs& a, int64_t count)
      : dim_ld(padded(a.dim)),
        value_ld(padded(a.value_dim)),
        keys(round_up(count, kKeys)),
        row_ld(padded(keys)),
        scratch(floats()) {
    k = scratch.take(keys * dim_ld);
    v = scratch.take(kKeys * value_ld);
    kt = scratch.take(keys / kKeys * dim_ld * key_ld);
    vt = scratch.take(keys / kKeys * value_ld * key_ld);
    q = scratch.take(kRows * dim_ld);
    dq = scratch.take(kRows * dim_ld);
    dout = scratch.take(kRows * value_ld);
    s = scratch.take(kRows * row_ld);
    dp = scratch.take(kRows * row_ld);
    scales = scratch.take(row_ld + kPhiloxNumbers);
    derivative = scratch.take(row_ld);
    dbias = scratch.take(row_ld);
  }

  int64_t floats() const {
    const int64_t packed = keys * dim_ld + kKeys * value_ld + keys / kKeys * (dim_ld + value_ld) * key_ld;
    return packed + kRows * (2 * dim_ld + value_ld + 2 * row_ld) + 3 * row_ld + kPhiloxNumbers;
  }
};

// One query head of a task. Columns of s and dp, and rows of k, dk and dv, count from key `base`.
struct Head {
  const AttentionBackward& f;
  const Scores& scores;
  const Band& band;
  int64_t batch, head, base;
  const float* dlse;  // [queries] or null
  float *dbias, *dk, *dv;
};

// Where query i's ds goes, from column `col` on. A sum over queries is taken in short sums, in t.dbias.
float* dbias_row(const Head& h, Tiles& t, int64_t i, int64_t col) {
  const int64_t row = h.f.dbias_strides[2], stride = h.f.dbias_strides[3];
  return row == 0 ? t.dbias + col * stride : h.dbias + i * row + (h.base + col) * stride;
}

// Adds ds to dbias: key by key, or its sum if the stride is 0.
void add_dbias(float* to, int64_t stride, int64_t n, const float* ds) {
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

// Over whole vectors of columns s becomes p (dropped) and dp becomes ds, given s and the scales that dropout
// multiplies with. kDrops: whether it does.
template <bool kDrops>
void softmax_backward(Range whole, float dlse, const float* scales, float* s, float* dp) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t c = whole.begin; c < whole.end; ++c) top = s[c] > top ? s[c] : top;
  const float shift = top == -INFINITY ? 0 : top;
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t c = whole.begin; c < whole.end; ++c) {
    const float e = exp_nonpositive(s[c] - shift);
    if constexpr (kDrops) dp[c] *= scales[c];
    s[c] = e;
    sum += e;
    product += e * dp[c];
  }
  const float inverse = sum == 0 ? 0 : 1 / sum, delta = product * inverse - dlse;
#pragma omp simd
  for (int64_t c = whole.begin; c < whole.end; ++c) {
    const float p = s[c] * inverse;
    dp[c] = p * (dp[c] - delta);
    s[c] = kDrops ? p * scales[c] : p;
  }
}

// Query i: s = q . k becomes p, dp becomes ds; both are 0 in the columns `all` that it does not keep.
void gradient_row(const Head& h, Tiles& t, int64_t i, Range all, float* s, float* dp) {
  const Range row = h.band.keys_of({i, i + 1});
  const Range kept = row.empty() ? Range{all.begin, all.begin} : Range{row.begin - h.base, row.end - h.base};
  const int64_t j = h.base + kept.begin, n = kept.end - kept.begin;
  h.scores.adjust(i, j, n, s + kept.begin, t.derivative);
  const Range whole = n == 0 ? kept : whole_vectors(kept, -INFINITY, s);
  const float dlse = h.dlse ? h.dlse[i] : 0;
  if (h.scores.drops()) {
    h.scores.dropout(i, h.base + whole.begin, whole.end - whole.begin, t.scales + whole.begin);
    softmax_backward<true>(whole, dlse, t.scales, s, dp);
  } else {
    softmax_backward<false>(whole, dlse, nullptr, s, dp);
  }
  if (h.dbias) add_dbias(dbias_row(h, t, i, kept.begin), h.f.dbias_strides[3], n, dp + kept.begin);
  if (h.scores.capped()) {
    for (int64_t c = 0; c < n; ++c) dp[kept.begin + c] *= t.derivative[c];
  }
  for (float* values : {s, dp}) {
    for (int64_t c = all.begin; c < whole.begin; ++c) values[c] = 0;
    for (int64_t c = whole.end; c < all.end; ++c) values[c] = 0;
  }
}

// q . k and dp of a group of queries, r0 the first one's row in the tiles.
void products(const Head& h, Tiles& t, int64_t r0, int64_t count, Range kept) {
  const AttentionInputs& a = h.f.in;
  const Left q = {t.q + r0 * t.dim_ld, t.dim_ld, 1}, dout = {t.dout + r0 * t.value_ld, t.value_ld, 1};
  for (int64_t j = round_down(kept.begin, kKeys); j < kept.end; j += kKeys) {
    const int64_t begin = round_down(std::max(j, kept.begin), kLine);
    const int64_t n =
        round_up(std::min(j + kKeys, kept.end) - begin, kLine);  // no NaN may be left where p is 0
    const float *kt = t.kt + j / kKeys * t.dim_ld * t.key_ld, *vt = t.vt + j / kKeys * t.value_ld * t.key_ld;
    float *s = t.s + r0 * t.row_ld + begin, *dp = t.dp + r0 * t.row_ld + begin;
    multiply(false, count, n, a.dim, q, kt + begin - j, t.key_ld, s, t.row_ld);
    multiply(false, count, n, a.value_dim, dout, vt + begin - j, t.key_ld, dp, t.row_ld);
  }
}

// Adds to dk and dv of some keys; p and ds are read as their transposes.
void add_keys(const Head& h, Tiles& t, Range rows, Range keys) {
  const AttentionInputs& a = h.f.in;
  const Range kept = intersection(h.band.queries_of(keys), rows);
  if (kept.empty()) return;
  const int64_t r0 = kept.begin - rows.begin, c0 = keys.begin - h.base, start = r0 * t.row_ld + c0;
  const int64_t count = keys.end - keys.begin, depth = kept.end - kept.begin;
  if (h.f.dv) {
    multiply(true, count, a.value_dim, depth, {t.s + start, 1, t.row_ld}, t.dout + r0 * t.value_ld,
             t.value_ld, h.dv + c0 * t.value_ld, t.value_ld);
  }
  if (h.f.dk) {
    multiply(true, count, a.dim, depth, {t.dp + start, 1, t.row_ld}, t.q + r0 * t.dim_ld, t.dim_ld,
             h.dk + c0 * t.dim_ld, t.dim_ld);
  }
}

// dk and dv of all keys that these queries keep: at once for keys that all of them keep, in groups at the
// edges.
void add_all_keys(const Head& h, Tiles& t, Range rows, Range kept) {
  const Range first = h.band.keys_of({rows.begin, rows.begin + 1}),
              last = h.band.keys_of({rows.end - 1, rows.end});
  const Range shared = intersection(first, last);
  for (int64_t j = kept.begin; j < kept.end;) {
    int64_t end = std::min(kept.end, j + kGroup);
    if (!shared.empty() && j < shared.begin) end = std::min(end, shared.begin);
    if (!shared.empty() && j == shared.begin) end = shared.end;
    add_keys(h, t, rows, {j, end});
    j = end;
  }
}

// Some queries of one head: their dq, and what they add to dk and dv.
void query_rows(const Head& h, Tiles& t, Range rows) {
  const AttentionInputs& a = h.f.in;
  const int64_t count = rows.end - rows.begin;
  load_rows(a.dtype, a.q, h.batch, h.head, rows, a.dim, t.q);
  if (h.f.dout.data) {
    load_rows(a.dtype, h.f.dout, h.batch, h.head, rows, a.value_dim, t.dout);
  } else {
    std::fill(t.dout, t.dout + count * t.value_ld, 0.0f);
  }
  const Range kept = h.band.keys_of(rows),
              all = {kept.begin - h.base, std::max(kept.begin, kept.end) - h.base};
  const bool sums = h.dbias && h.f.dbias_strides[2] == 0;
  if (sums) std::fill(t.dbias, t.dbias + t.row_ld, 0.0f);
  for (int64_t r = 0; r < count; r += kGroup) {
    const int64_t group = std::min(kGroup, count - r), i = rows.begin + r;
    const Range own = h.band.keys_of({i, i + group});
    const Range cols = own.empty() ? Range{0, 0} : Range{own.begin - h.base, own.end - h.base};
    products(h, t, r, group, cols);
    for (int64_t g = r; g < r + group; ++g) {
      gradient_row(h, t, rows.begin + g, all, t.s + g * t.row_ld, t.dp + g * t.row_ld);
    }
    if (!h.f.dq) continue;
    multiply(false, group, a.dim, cols.end - cols.begin, {t.dp + r * t.row_ld + cols.begin, t.row_ld, 1},
             t.k + cols.begin * t.dim_ld, t.dim_ld, t.dq + r * t.dim_ld, t.dim_ld);
  }
  if (h.f.dq) store_rows(a.dtype, t.dq, a.heads, a.queries, h.batch, h.head, rows, a.dim, a.scale, h.f.dq);
  if (sums) {
    const int64_t stride = h.f.dbias_strides[3], n = stride == 0 ? 1 : all.end - all.begin,
                  col = all.begin * stride;
    add_dbias(h.dbias + h.base * stride + col, 1, n, t.dbias + col);
  }
  add_all_keys(h, t, rows, kept);
}

void pack_keys(const AttentionInputs& a, int64_t batch, int64_t kv_head, Range keys, Tiles& t) {
  for (int64_t j = 0; j < keys.end - keys.begin; j += kKeys) {
    const Range cols = {keys.begin + j, std::min(keys.end, keys.begin + j + kKeys)};
    load_rows(a.dtype, a.k, batch, kv_head, cols, a.dim, t.k + j * t.dim_ld);
    load_rows(a.dtype, a.v, batch, kv_head, cols, a.value_dim, t.v);
    float *kt = t.kt + j / kKeys * t.dim_ld * t.key_ld, *vt = t.vt + j / kKeys * t.value_ld * t.key_ld;
    transpose_tile(t.k + j * t.dim_ld, cols.end - cols.begin, a.dim, kt, t.key_ld);
    transpose_tile(t.v, cols.end - cols.begin, a.value_dim, vt, t.key_ld);
  }
}

// dk or dv of some keys: the parts of all chunks, added in their order, times `factor`.
void store_keys(const AttentionInputs& a, const Part* parts, int64_t chunks, Floats Part::* which,
                int64_t batch, int64_t kv_head, Range keys, int64_t cols, float factor, void* out) {
  const int64_t ld = padded(cols);
  Scratch scratch(kKeys * ld);
  float* tile = scratch.take(kKeys * ld);
  std::fill(tile, tile + (keys.end - keys.begin) * ld, 0.0f);
  for (const Part* part = parts; part < parts + chunks; ++part) {
    const Range both = intersection(part->keys, keys);
    if (both.empty()) continue;
    const float* from = (part->*which).get() + (both.begin - part->keys.begin) * ld;
    float* to = tile + (both.begin - keys.begin) * ld;
#pragma omp simd
    for (int64_t c = 0; c < (both.end - both.begin) * ld; ++c) to[c] += from[c];
  }
  store_rows(a.dtype, tile, a.kv_heads, a.keys, batch, kv_head, keys, cols, factor, out);
}

void store_all_keys(const AttentionBackward& f, const Part* parts, int64_t chunks, int64_t batch,
                    int64_t kv_head, int64_t j) {
  const AttentionInputs& a = f.in;
  const Range keys = {j, std::min(a.keys, j + kKeys)};
  if (f.dk) store_keys(a, parts, chunks, &Part::dk, batch, kv_head, keys, a.dim, a.scale, f.dk);
  if (f.dv) store_keys(a, parts, chunks, &Part::dv, batch, kv_head, keys, a.value_dim, 1, f.dv);
}

Floats zeros(int64_t count) {
  Floats made = make_floats(count);
  std::fill(made.get(), made.get() + count, 0.0f);
  return made;
}

void backward_chunk(const AttentionBackward& f, int64_t batch, int64_t kv_head, Range queries, Part& part) {
  const AttentionInputs& a = f.in;
  const Band band = band_of(a, batch);
  const Range kept = band.keys_of(queries);
  part.keys = kept.empty() ? Range{0, 0} : Range{round_down(kept.begin, kLine), kept.end};
  const int64_t count = part.keys.end - part.keys.begin, group = a.heads / a.kv_heads;
  Tiles t(a, count);
  pack_keys(a, batch, kv_head, part.keys, t);
  part.dk = zeros(f.dk ? count * t.dim_ld : 0);
  part.dv = zeros(f.dv ? count * t.value_ld : 0);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Scores scores(a, batch, head);
    float* dbias = f.dbias ? f.dbias + batch * f.dbias_strides[0] + head * f.dbias_strides[1] : nullptr;
    const float* dlse = f.dlse ? f.dlse + (batch * a.heads + head) * a.queries : nullptr;
    const Head h = {f, scores, band, batch, head, part.keys.begin, dlse, dbias, part.dk.get(), part.dv.get()};
    for (int64_t i = queries.begin; i < queries.end; i += kRows) {
      query_rows(h, t, {i, std::min(queries.end, i + kRows)});
    }
  }
}

}  // namespace

void attention_backward(const Context& context, const AttentionBackward& f) {
  const AttentionInputs& a = f.in;
  const Split split(f);
  const int64_t groups = split.batches * split.kv_heads,
                batches = a.batch / std::max<int64_t>(1, split.batches);
  const int64_t kv_heads = a.kv_heads / split.kv_heads, pieces = divide_up(a.keys, kKeys);
  std::vector<Part> parts(static_cast<size_t>(a.batch * a.kv_heads * split.chunks));
  parallel_tasks(context, groups * split.chunks, [&](int64_t index) {
    // The last queries first: with a causal band they have the most keys.
    const int64_t chunk = split.chunks - 1 - index / groups, group = index % groups;
    const Range queries = {std::min(a.queries, chunk * split.chunk),
                           std::min(a.queries, (chunk + 1) * split.chunk)};
    const int64_t b0 = group / split.kv_heads * batches, h0 = group % split.kv_heads * kv_heads;
    for (int64_t batch = b0; batch < b0 + batches; ++batch) {
      for (int64_t head = h0; head < h0 + kv_heads; ++head) {
        Part& part = parts[static_cast<size_t>((batch * a.kv_heads + head) * split.chunks + chunk)];
        backward_chunk(f, batch, head, queries, part);
        if (split.chunks > 1) continue;
        for (int64_t piece = 0; piece < pieces; ++piece)
          store_all_keys(f, &part, 1, batch, head, piece * kKeys);
        part = Part();
      }
    }
  });
  if (split.chunks == 1) return;
  parallel_tasks(context, a.batch * a.kv_heads * pieces, [&](int64_t index) {
    const int64_t head = index / pieces;
    store_all_keys(f, &parts[static_cast<size_t>(head * split.chunks)], split.chunks, head / a.kv_heads,
                   head % a.kv_heads, index % pieces * kKeys);
  });
}

}  // namespace fastlm
