// What attention's forward and backward share: which keys a query keeps, and what is done to a row of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../contract/attention.h"
#include "philox.h"
#include "rows.h"
#include "tiles.h"

namespace fastlm {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline Range intersection(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// The (query, key) pairs that offset, left, right and the number of keys keep: a band along the diagonal.
struct Band {
  int64_t queries, keys, offset, left, right;

  // The keys that at least one of these queries keeps.
  Range keys_of(Range rows) const {
    const int64_t begin = left < 0 ? 0 : rows.begin + offset - left;
    const int64_t end = right < 0 ? keys : rows.end + offset + right;
    return intersection({begin, end}, {0, keys});
  }

  // The queries that keep at least one of these keys.
  Range queries_of(Range cols) const {
    const int64_t begin = right < 0 ? 0 : cols.begin - offset - right;
    const int64_t end = left < 0 ? queries : cols.end - offset + left;
    return intersection({begin, end}, {0, queries});
  }

  // Whether every one of these queries keeps every one of these keys.
  bool covers(Range rows, Range cols) const {
    const Range first = keys_of({rows.begin, rows.begin + 1}), last = keys_of({rows.end - 1, rows.end});
    return first.end >= cols.end && last.begin <= cols.begin;
  }
};

// How many rows sequence `batch` has, `seq` being what all have if they are not packed.
inline int64_t length_of(const Heads& t, int64_t batch, int64_t seq) {
  return t.starts ? t.starts[batch + 1] - t.starts[batch] : seq;
}

// Its first row, in a tensor that is contiguous as [batch, seq, ...], or packed as t is.
inline int64_t first_row(const Heads& t, int64_t batch, int64_t seq) {
  return t.starts ? t.starts[batch] : batch * seq;
}

// Where its first query is in the statistics of a head, [batch, heads, queries] or packed [heads, queries].
inline int64_t first_statistic(const AttentionInputs& a, int64_t batch, int64_t head) {
  return a.q.starts ? head * a.queries + a.q.starts[batch] : (batch * a.heads + head) * a.queries;
}

inline Band band_of(const AttentionInputs& a, int64_t batch) {
  const int64_t queries = length_of(a.q, batch, a.queries), all = length_of(a.k, batch, a.keys);
  const int64_t keys = a.kv_lengths ? std::clamp<int64_t>(a.kv_lengths[batch], 0, all) : all;
  return {queries, keys, a.bottom_right ? all - queries : a.offset, a.left, a.right};
}

// Work is cut by what a sequence has of it: into how many of `tasks` tasks, of total work `total`.
inline int64_t share_of(double work, double total, int64_t tasks) {
  return work > 0 ? static_cast<int64_t>(std::ceil(static_cast<double>(tasks) * work / total)) : 1;
}

// (query, key) pairs of sequence `batch`, whatever the band keeps of them.
inline double pairs_of(const AttentionInputs& a, int64_t batch) {
  return static_cast<double>(length_of(a.q, batch, a.queries)) *
         static_cast<double>(length_of(a.k, batch, a.keys));
}

// Some queries of one sequence, and about how many pairs the band keeps of theirs.
struct Block {
  int64_t batch, piece;
  Range queries;
  int64_t pairs;
};

// Adds to `blocks` sequence `batch` in pieces of `size` queries: at least one, be it empty.
inline void cut_sequence(const Band& band, int64_t batch, int64_t size, std::vector<Block>& blocks) {
  int64_t i = 0, piece = 0;
  do {
    const Range queries = {i, std::min(band.queries, i + size)}, keys = band.keys_of(queries);
    const int64_t kept = keys.empty() ? 0 : keys.end - keys.begin;
    blocks.push_back({batch, piece++, queries, kept * (queries.end - queries.begin)});
  } while ((i += size) < band.queries);
}

// The longest first, so that the last tasks to start are short ones.
inline void sort_blocks(std::vector<Block>& blocks) {
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.pairs > b.pairs; });
}

constexpr int64_t kTaskProducts = 1 << 20;  // 25 us at 80 GFLOP/s: for less than that no thread is woken
constexpr int64_t kBlockPairs = 128;        // what a block costs beside its pairs, in pairs

// Runs f(block, group) for all blocks, group in [0, groups). What is short shares a task; `times`: how often
// f goes through the block's pairs.
template <class F>
void parallel_blocks(const Context& context, const AttentionInputs& a, const std::vector<Block>& blocks,
                     int64_t groups, int64_t times, const F& f) {
  std::vector<int64_t> ends = {0};  // of tasks, counted in blocks x groups
  int64_t work = 0;
  const int64_t count = static_cast<int64_t>(blocks.size()) * groups;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pairs = blocks[static_cast<size_t>(i / groups)].pairs + kBlockPairs;
    work += pairs * times * (a.dim + a.value_dim);
    if (work < kTaskProducts && i + 1 < count) continue;
    ends.push_back(i + 1);
    work = 0;
  }
  parallel_tasks(context, static_cast<int64_t>(ends.size()) - 1, [&](int64_t index) {
    const int64_t* range = ends.data() + index;
    for (int64_t i = range[0]; i < range[1]; ++i) f(blocks[static_cast<size_t>(i / groups)], i % groups);
  });
}

// Where row `row` of one head starts.
inline int64_t start_of(const Heads& t, int64_t batch, int64_t head, int64_t row) {
  return batch * t.batch + head * t.head + ((t.starts ? t.starts[batch] : 0) + row) * t.seq;
}

// Rows [rows.begin, rows.end) of one head as a tile.
inline void load_rows(DType dtype, const Heads& t, int64_t batch, int64_t head, Range rows, int64_t cols,
                      float* out) {
  const int64_t start = start_of(t, batch, head, rows.begin);
  with_dtype(dtype, [&]<class T>() {
    load_tile(static_cast<const T*>(t.data) + start, t.seq, rows.end - rows.begin, cols, out);
  });
}

constexpr int64_t kFew = 48;  // queries: copying keys and values for no more costs more than it saves

// Those rows where they lie, if there are so few queries and it is whole lines of float32 by four; else as a
// tile in `buffer`, whose rows do not compete for the same cache sets.
inline Rows rows_of(int64_t queries, DType dtype, const Heads& t, int64_t batch, int64_t head, Range rows,
                    int64_t cols, float* buffer) {
  const bool whole = cols % kLine == 0 && (rows.end - rows.begin) % 4 == 0;
  if (dtype == DType::kFloat32 && whole && queries <= kFew) {
    return {static_cast<const float*>(t.data) + start_of(t, batch, head, rows.begin), t.seq};
  }
  load_rows(dtype, t, batch, head, rows, cols, buffer);
  return {buffer, padded(cols)};
}

// The opposite, into a tensor that is contiguous as [batch, seq, heads, cols]; `first` is the sequence's
// first_row.
inline void store_rows(DType dtype, const float* tile, int64_t heads, int64_t first, int64_t head, Range rows,
                       int64_t cols, float factor, void* out) {
  const int64_t start = ((first + rows.begin) * heads + head) * cols;
  with_dtype(dtype, [&]<class T>() {
    store_tile(tile, rows.end - rows.begin, cols, factor, static_cast<T*>(out) + start, heads * cols);
  });
}

// The scores of one query head: from scale * q . k to what the softmax takes.
class Scores {
 public:
  Scores(const AttentionInputs& a, int64_t batch, int64_t head)
      : scale_(a.scale),
        softcap_(a.softcap),
        offset_(band_of(a, batch).offset),
        slope_(a.alibi_slopes ? a.alibi_slopes[batch * a.alibi_strides[0] + head * a.alibi_strides[1]] : 0),
        bias_(a.bias),
        bias_dtype_(a.bias_dtype),
        bias_start_(batch * a.bias_strides[0] + head * a.bias_strides[1]),
        bias_strides_{a.bias_strides[2], a.bias_strides[3]},
        mask_(a.mask ? a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1] : nullptr),
        mask_strides_{a.mask_strides[2], a.mask_strides[3]},
        dropout_(a.dropout),
        drops_(a.dropout.p > 0),
        head_(static_cast<uint32_t>(batch * a.heads + head)) {}

  bool capped() const { return softcap_ > 0; }
  bool drops() const { return drops_; }

  // Turns s[c] = q_i . k_(j + c), c in [0, n), into scores; `derivative`, unless null, gets the
  // softcap's.
  void adjust(int64_t i, int64_t j, int64_t n, float* s, float* derivative) const {
    const float scale = scale_;  // here and not in q, whose rounding would show in every score
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) s[c] *= scale;
    if (capped()) cap(n, s, derivative);
    if (slope_ != 0) {
      const float slope = slope_, distance = static_cast<float>(i + offset_ - j);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) s[c] -= slope * std::fabs(distance - static_cast<float>(c));
    }
    if (bias_) add_bias(bias_start_ + i * bias_strides_[0] + j * bias_strides_[1], n, s);
    if (mask_) exclude(mask_ + i * mask_strides_[0] + j * mask_strides_[1], n, s);
  }

  // What dropout multiplies the probabilities of query i and keys [j, j + n) with; n is rounded up to 64, j
  // is a multiple of 4.
  void dropout(int64_t i, int64_t j, int64_t n, float* scales) const {
    dropout_.columns(static_cast<uint32_t>(i), head_, j, n, scales);
  }

 private:
  void cap(int64_t n, float* s, float* derivative) const {
    const float softcap = softcap_, inverse = 1 / softcap_;
    if (derivative) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const float t = tanh(s[c] * inverse);
        s[c] = softcap * t;
        derivative[c] = 1 - t * t;
      }
      return;
    }
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) s[c] = softcap * tanh(s[c] * inverse);
  }

  void add_bias(int64_t start, int64_t n, float* s) const {
    const int64_t stride = bias_strides_[1];
    with_dtype(bias_dtype_, [&]<class T>() {
      const T* bias = static_cast<const T*>(bias_) + start;
      if (stride == 1) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) s[c] += to_float(bias[c]);
      } else {
        for (int64_t c = 0; c < n; ++c) s[c] += to_float(bias[c * stride]);
      }
    });
  }

  void exclude(const bool* mask, int64_t n, float* s) const {
    const int64_t stride = mask_strides_[1];
    if (stride == 1) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) s[c] = mask[c] ? s[c] : -INFINITY;
    } else {
      for (int64_t c = 0; c < n; ++c) s[c] = mask[c * stride] ? s[c] : -INFINITY;
    }
  }

  float scale_, softcap_;
  int64_t offset_;
  float slope_;
  const void* bias_;
  DType bias_dtype_;
  int64_t bias_start_, bias_strides_[2];
  const bool* mask_;
  int64_t mask_strides_[2];
  DropoutScale dropout_;
  bool drops_;
  uint32_t head_;
};

// Columns [kept.begin, kept.end) of a tile's row, rounded outwards to whole vectors: what lies between is set
// to `fill`, and so need not be looked at one by one.
inline Range whole_vectors(Range kept, float fill, float* row) {
  const Range whole = {round_down(kept.begin, kLine), round_up(kept.end, kLine)};
  for (int64_t c = whole.begin; c < kept.begin; ++c) row[c] = fill;
  for (int64_t c = kept.end; c < whole.end; ++c) row[c] = fill;
  return whole;
}

}  // namespace fastlm
