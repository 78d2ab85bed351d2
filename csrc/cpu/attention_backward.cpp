// attention, backward: a task is a chunk of the queries of all query heads that read one key head. A few
// queries at a time it holds their scores and dp for all keys, so that memory stays linear and the softmax's
// backward is the plain one: sum_j p_ij dp_ij is taken from the very dp that it is subtracted from (dout .
// out, which would save a pass, is rounded otherwise: 2.5 times the error was seen where one key has most of
// the weight). dk and dv are summed in the task's own buffers; those of several chunks are added in their
// order. Bound by 10 * dim FLOPs a pair.
#include <utility>
#include <vector>

#include "attention.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kKeys = 128;  // a tile of keys: K^T, V^T, K, dk and dv of 64 dims are 170 KB
constexpr int64_t kRows = 96;   // queries at a time: their scores and dp for 1024 keys are 800 KB
constexpr int64_t kGroup =
    24;  // rows or keys at a time along the band's edges: skips most of what is outside
constexpr int64_t kTasks = 16;   // with fewer heads than this the queries are cut into chunks
constexpr int64_t kChunk = 256;  // at least so many queries each, so that packing the keys stays a small part

// How the work is cut: by the sequences' lengths alone. Heads and queries that share an element of dbias are
// one task's.
struct Split {
  int64_t batches, kv_heads;         // that a task takes in turn: 1 each, or all
  std::vector<Block> blocks;         // each is a task for every group of key heads
  std::vector<int64_t> chunks;       // of a sequence's queries
  std::vector<int64_t> parts = {0};  // of all sequences before one

  explicit Split(const AttentionBackward& f) {
    const AttentionInputs& a = f.in;
    batches = f.dbias && f.dbias_strides[0] == 0 ? a.batch : 1;
    kv_heads = f.dbias && f.dbias_strides[1] == 0 ? a.kv_heads : 1;
    const bool whole = f.dbias && f.dbias_strides[2] == 0;
    double total = 0;
    for (int64_t batch = 0; batch < a.batch; ++batch) total += pairs_of(a, batch);
    total *= static_cast<double>(a.kv_heads);
    for (int64_t batch = 0; batch < a.batch; ++batch) {
      const Band band = band_of(a, batch);
      const double own = pairs_of(a, batch) * static_cast<double>(batches * kv_heads);
      const int64_t wanted = whole ? 1 : share_of(own, total, kTasks);
      chunks.push_back(std::clamp<int64_t>(divide_up(band.queries, kChunk), 1, wanted));
      parts.push_back(parts.back() + a.kv_heads * chunks.back());
      if (batch % batches > 0) continue;
      cut_sequence(band, batch, std::max<int64_t>(1, divide_up(band.queries, chunks.back())), blocks);
    }
    sort_blocks(blocks);
  }

  int64_t chunks_of(int64_t batch) const { return chunks[static_cast<size_t>(batch)]; }

  // Which Part belongs to a chunk of a sequence and a key head.
  size_t part_of(int64_t batch, int64_t head, int64_t chunk) const {
    return static_cast<size_t>(parts[static_cast<size_t>(batch)] + head * chunks_of(batch) + chunk);
  }
};

// One chunk's part of dk and dv of one key head: rows of keys that its queries keep.
struct Part {
  Range keys = {0, 0};
  float *dk = nullptr, *dv = nullptr;
  Floats memory;  // of both, where they outlive their task
};

struct Tiles {
  int64_t dim_ld, value_ld, key_ld = padded(kKeys), keys, row_ld;
  Scratch scratch;
  float *k, *kt, *v, *vt, *q, *dout, *dq, *s, *dp, *scales, *derivative, *dbias;
  Rows all_keys;

  // sums: whether dk and dv are this task's alone.
  Tiles(const AttentionInputs& a, int64_t count, bool sums)
      : dim_ld(padded(a.dim)),
        value_ld(padded(a.value_dim)),
        keys(round_up(count, kKeys)),
        row_ld(padded(keys)),
        scratch(floats() + (sums ? count * (dim_ld + value_ld) : 0)) {
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
  float *dbias, *dbias_lost, *dk, *dv;
};

// Sums, and what they have rounded away so far, which may be null.
struct Sums {
  float *to, *lost;

  Sums from(int64_t at) const { return {to + at, lost ? lost + at : nullptr}; }
};

// Where query i's ds goes, from column `col` on. A sum over queries is taken in short sums, in t.dbias.
Sums dbias_row(const Head& h, Tiles& t, int64_t i, int64_t col) {
  const int64_t row = h.f.dbias_strides[2], stride = h.f.dbias_strides[3];
  if (row == 0) return {t.dbias + col * stride, nullptr};
  return Sums{h.dbias, h.dbias_lost}.from(i * row + (h.base + col) * stride);
}

// to += x, as if in twice the precision. Source: Kahan, "Further remarks on reducing truncation errors".
inline void add_exactly(float& to, float& lost, float x) {
  const float y = x - lost, sum = to + y;
  lost = (sum - to) - y;
  to = sum;
}

// Adds ds to dbias: key by key, or its sum if the stride is 0.
void add_dbias(Sums sums, int64_t stride, int64_t n, const float* ds) {
  float sum = 0, *to = sums.to, *lost = sums.lost;
  if (stride == 1 && lost) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) add_exactly(to[c], lost[c], ds[c]);
  } else if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] += ds[c];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; ++c) sum += ds[c];
    if (lost) {
      add_exactly(*to, *lost, sum);
    } else {
      *to += sum;
    }
  }
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

// q . k and dp of some queries, r0 the first one's row in the tiles, and keys of one packed tile.
void products(const Head& h, Tiles& t, int64_t r0, int64_t count, Range kept) {
  const AttentionInputs& a = h.f.in;
  const Left q = {t.q + r0 * t.dim_ld, t.dim_ld, 1}, dout = {t.dout + r0 * t.value_ld, t.value_ld, 1};
  const int64_t begin = round_down(kept.begin, kLine), tile = kept.begin / kKeys, first = begin % kKeys;
  const int64_t n = round_up(kept.end - begin, kLine);  // no NaN may be left where p is 0
  const float* kt = t.kt + tile * t.dim_ld * t.key_ld + first;
  const float* vt = t.vt + tile * t.value_ld * t.key_ld + first;
  const int64_t start = r0 * t.row_ld + begin;
  multiply(false, count, n, a.dim, q, kt, t.key_ld, t.s + start, t.row_ld);
  multiply(false, count, n, a.value_dim, dout, vt, t.key_ld, t.dp + start, t.row_ld);
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

// Calls f(first row, rows, keys) with the keys of a tile that the rows keep: all rows at once where they keep
// all of it, else in groups.
template <class F>
void for_groups(const Head& h, Range rows, Range tile, const F& f) {
  const int64_t step = h.band.covers(rows, tile) ? rows.end - rows.begin : kGroup;
  for (int64_t i = rows.begin; i < rows.end; i += step) {
    const Range group = {i, std::min(rows.end, i + step)};
    const Range keys = intersection(h.band.keys_of(group), tile);
    if (!keys.empty()) f(i - rows.begin, group.end - i, Range{keys.begin - h.base, keys.end - h.base});
  }
}

// What p and ds of these queries and this tile of keys add to dq, dk and dv.
void add_tile(const Head& h, Tiles& t, Range rows, Range tile) {
  const AttentionInputs& a = h.f.in;
  if (h.f.dq) {
    for_groups(h, rows, tile, [&](int64_t r0, int64_t count, Range keys) {
      multiply(true, count, a.dim, keys.end - keys.begin, {t.dp + r0 * t.row_ld + keys.begin, t.row_ld, 1},
               t.all_keys.data + keys.begin * t.all_keys.ld, t.all_keys.ld, t.dq + r0 * t.dim_ld, t.dim_ld);
    });
  }
  const int64_t step = h.band.covers(rows, tile) ? kKeys : kGroup;
  for (int64_t j = tile.begin; j < tile.end; j += step) {
    add_keys(h, t, rows, {j, std::min(tile.end, j + step)});
  }
}

void load_queries(const Head& h, Tiles& t, Range rows) {
  const AttentionInputs& a = h.f.in;
  const int64_t count = rows.end - rows.begin;
  load_rows(a.dtype, a.q, h.batch, h.head, rows, a.dim, t.q);
  if (h.f.dout.data) {
    load_rows(a.dtype, h.f.dout, h.batch, h.head, rows, a.value_dim, t.dout);
  } else {
    std::fill(t.dout, t.dout + count * t.value_ld, 0.0f);
  }
  std::fill(t.dq, t.dq + count * t.dim_ld, 0.0f);
}

// Some queries of one head: their dq, and what they add to dk and dv. Tile by tile of keys, so that all of
// the queries use what has been fetched of K^T, V^T, K, dk and dv.
void query_rows(const Head& h, Tiles& t, Range rows) {
  const AttentionInputs& a = h.f.in;
  load_queries(h, t, rows);
  const Range kept = h.band.keys_of(rows),
              all = {kept.begin - h.base, std::max(kept.begin, kept.end) - h.base};
  const auto for_tiles = [&](const auto& f) {
    for (int64_t j = round_down(all.begin, kKeys); j < all.end; j += kKeys) {
      f(intersection({h.base + j, h.base + j + kKeys}, kept));
    }
  };
  const bool sums = h.dbias && h.f.dbias_strides[2] == 0;
  if (sums) std::fill(t.dbias, t.dbias + t.row_ld, 0.0f);
  for_tiles([&](Range tile) {
    for_groups(h, rows, tile,
               [&](int64_t r0, int64_t count, Range keys) { products(h, t, r0, count, keys); });
  });
  for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
    gradient_row(h, t, rows.begin + r, all, t.s + r * t.row_ld, t.dp + r * t.row_ld);
  }
  for_tiles([&](Range tile) { add_tile(h, t, rows, tile); });
  if (h.f.dq) {
    const int64_t first = first_row(a.q, h.batch, a.queries);
    store_rows(a.dtype, t.dq, a.heads, first, h.head, rows, a.dim, a.scale, h.f.dq);
  }
  if (sums) {
    const int64_t stride = h.f.dbias_strides[3], n = stride == 0 ? 1 : all.end - all.begin,
                  col = all.begin * stride;
    add_dbias(Sums{h.dbias, h.dbias_lost}.from(h.base * stride + col), 1, n, t.dbias + col);
  }
}

void pack_keys(const AttentionInputs& a, int64_t batch, int64_t kv_head, int64_t queries, Range keys,
               Tiles& t) {
  t.all_keys = rows_of(queries, a.dtype, a.k, batch, kv_head, keys, a.dim, t.k);
  for (int64_t j = 0; j < keys.end - keys.begin; j += kKeys) {
    const Range cols = {keys.begin + j, std::min(keys.end, keys.begin + j + kKeys)};
    const int64_t count = cols.end - cols.begin;
    float *kt = t.kt + j / kKeys * t.dim_ld * t.key_ld, *vt = t.vt + j / kKeys * t.value_ld * t.key_ld;
    const Rows values = rows_of(queries, a.dtype, a.v, batch, kv_head, cols, a.value_dim, t.v);
    transpose_tile({t.all_keys.data + j * t.all_keys.ld, t.all_keys.ld}, count, a.dim, kt, t.key_ld);
    transpose_tile(values, count, a.value_dim, vt, t.key_ld);
  }
}

Floats zeros(int64_t count) {
  Floats made = make_floats(count);
  std::fill(made.get(), made.get() + count, 0.0f);
  return made;
}

// dk or dv of some keys: the parts of all chunks, added in their order, times `factor`.
void store_keys(const AttentionInputs& a, const Part* parts, int64_t chunks, float* Part::* which,
                int64_t batch, int64_t kv_head, Range keys, int64_t cols, float factor, void* out) {
  const int64_t ld = padded(cols), first = first_row(a.k, batch, a.keys);
  if (chunks == 1 && parts->keys.begin <= keys.begin && keys.end <= parts->keys.end) {
    const float* sums = parts->*which + (keys.begin - parts->keys.begin) * ld;
    return store_rows(a.dtype, sums, a.kv_heads, first, kv_head, keys, cols, factor, out);
  }
  const Floats memory = zeros((keys.end - keys.begin) * ld);  // the scratch memory may hold the parts
  float* tile = memory.get();
  for (const Part* part = parts; part < parts + chunks; ++part) {
    const Range both = intersection(part->keys, keys);
    if (both.empty()) continue;
    const float* from = part->*which + (both.begin - part->keys.begin) * ld;
    float* to = tile + (both.begin - keys.begin) * ld;
#pragma omp simd
    for (int64_t c = 0; c < (both.end - both.begin) * ld; ++c) to[c] += from[c];
  }
  store_rows(a.dtype, tile, a.kv_heads, first, kv_head, keys, cols, factor, out);
}

void store_some_keys(const AttentionBackward& f, const Part* parts, int64_t chunks, int64_t batch,
                     int64_t kv_head, Range keys) {
  const AttentionInputs& a = f.in;
  if (f.dk) store_keys(a, parts, chunks, &Part::dk, batch, kv_head, keys, a.dim, a.scale, f.dk);
  if (f.dv) store_keys(a, parts, chunks, &Part::dv, batch, kv_head, keys, a.value_dim, 1, f.dv);
}

void store_all_keys(const AttentionBackward& f, const Part& part, int64_t batch, int64_t kv_head) {
  const int64_t keys = length_of(f.in.k, batch, f.in.keys);
  for (int64_t j = 0; j < keys; j += kKeys) {
    store_some_keys(f, &part, 1, batch, kv_head, {j, std::min(keys, j + kKeys)});
  }
}

// alone: no other chunk adds to dk and dv, so that they are stored at once.
void backward_chunk(const AttentionBackward& f, int64_t batch, int64_t kv_head, Range queries, bool alone,
                    Part& part) {
  const AttentionInputs& a = f.in;
  const Band band = band_of(a, batch);
  const Range kept = band.keys_of(queries);
  part.keys = kept.empty() ? Range{0, 0} : Range{round_down(kept.begin, kLine), kept.end};
  const int64_t count = part.keys.end - part.keys.begin, group = a.heads / a.kv_heads;
  Tiles t(a, count, alone);
  pack_keys(a, batch, kv_head, queries.end - queries.begin, part.keys, t);
  const int64_t floats = count * (t.dim_ld + t.value_ld);
  if (!alone) part.memory = make_floats(floats);
  part.dk = alone ? t.scratch.take(floats) : part.memory.get();
  part.dv = part.dk + count * t.dim_ld;
  std::fill(part.dk, part.dk + floats, 0.0f);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Scores scores(a, batch, head);
    const int64_t at = batch * f.dbias_strides[0] + head * f.dbias_strides[1];
    float *dbias = f.dbias ? f.dbias + at : nullptr, *lost = f.dbias_lost ? f.dbias_lost + at : nullptr;
    const float* dlse = f.dlse ? f.dlse + first_statistic(a, batch, head) : nullptr;
    const Head h = {f, scores, band, batch, head, part.keys.begin, dlse, dbias, lost, part.dk, part.dv};
    for (int64_t i = queries.begin; i < queries.end; i += kRows) {
      query_rows(h, t, {i, std::min(queries.end, i + kRows)});
    }
  }
  if (alone) store_all_keys(f, part, batch, kv_head);
}

// The parts of the chunks of what sequences were cut into, added up: tiles of keys, of every head in turn.
void store_cut_keys(const Context& context, const AttentionBackward& f, const Split& split,
                    const std::vector<Part>& parts) {
  const AttentionInputs& a = f.in;
  std::vector<std::pair<int64_t, Range>> tiles;
  for (int64_t batch = 0; batch < a.batch; ++batch) {
    const int64_t keys = length_of(a.k, batch, a.keys);
    if (split.chunks_of(batch) == 1) continue;
    for (int64_t j = 0; j < keys; j += kKeys) tiles.push_back({batch, {j, std::min(keys, j + kKeys)}});
  }
  parallel_tasks(context, static_cast<int64_t>(tiles.size()) * a.kv_heads, [&](int64_t index) {
    const auto [batch, keys] = tiles[static_cast<size_t>(index / a.kv_heads)];
    const int64_t head = index % a.kv_heads;
    store_some_keys(f, &parts[split.part_of(batch, head, 0)], split.chunks_of(batch), batch, head, keys);
  });
}

}  // namespace

void attention_backward(const Context& context, const AttentionBackward& f) {
  const AttentionInputs& a = f.in;
  const Split split(f);
  const int64_t groups = a.kv_heads / split.kv_heads,
                times = split.batches * split.kv_heads * (a.heads / a.kv_heads);
  std::vector<Part> parts(static_cast<size_t>(split.parts.back()));
  parallel_blocks(context, a, split.blocks, groups, times, [&](const Block& block, int64_t group) {
    const int64_t h0 = group * split.kv_heads;
    for (int64_t batch = block.batch; batch < block.batch + split.batches; ++batch) {
      for (int64_t head = h0; head < h0 + split.kv_heads; ++head) {
        Part& part = parts[split.part_of(batch, head, block.piece)];
        backward_chunk(f, batch, head, block.queries, split.chunks_of(batch) == 1, part);
      }
    }
  });
  store_cut_keys(context, f, split, parts);
}

}  // namespace fastlm
