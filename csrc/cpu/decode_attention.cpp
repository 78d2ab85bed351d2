// decode_attention: a sequence's cache is cut into pieces of kPiece keys. A piece of one kv head is read
// once, for all the query heads that share it and all their queries ("rows"), tile by tile with the softmax's
// running maximum and sum; pieces are then merged in their order (flash decoding,
// https://pytorch.org/blog/flash-decoding). Bound by the bytes of the cache: a task prefetches kAheadBytes
// ahead, and scores come from whole vectors along dim, summed across lanes for kLanes keys at once.
#include "../contract/decode_attention.h"

#include <vector>

#include "kv_cache.h"
#include "streaming.h"

namespace fastlm {
namespace {

constexpr int64_t kPiece = 512;  // keys: 256 KB of cache at 64 dims in float32
constexpr int64_t kTile = 64;    // keys: their scores stay in registers' reach, 16 KB of keys in the L1 cache
constexpr int64_t kAheadBytes = 2048;  // into the second-level cache before use
constexpr int64_t kSpare = 64;         // rows past the last one that may be named: groups of keys, prefetches
constexpr int64_t kTaskBytes =
    128 << 10;            // of cache a task: waking a thread costs as much as reading some 100 KB
constexpr int kRows = 4;  // rows whose sums fit into registers together
constexpr int kValueSums = kLanes == 16 ? 16 : 8;  // vectors of sums while values are added up

struct Piece {
  int64_t batch, begin, end;  // keys
  int64_t partial;            // index of its first head's partial result; -1: it is the sequence's only piece
};

// What a piece leaves for merging, for each row: out, not yet divided, then maximum and sum.
struct Partials {
  int64_t rows, ld;  // ld floats a row
  Floats memory;
  float* row(int64_t index, int64_t r) const { return memory.get() + (index * rows + r) * ld; }
};

int64_t rows_of(const DecodeAttention& a) { return a.heads / a.kv_heads * a.queries; }

int64_t length_of(const DecodeAttention& a, int64_t batch) {
  return std::clamp<int64_t>(a.pages.lengths[batch], 0, a.pages.capacity());
}

// Row r is query r % queries of query head r / queries among those that share a kv head.
struct Row {
  int64_t batch, head, query;
};

Row row_of(const DecodeAttention& a, int64_t batch, int64_t kv_head, int64_t r) {
  return {batch, kv_head * (a.heads / a.kv_heads) + r / a.queries, r % a.queries};
}

void store(const DecodeAttention& a, Row row, const float* out, float maximum, float sum) {
  const bool empty = sum == 0;
  const float factor = empty ? 0 : 1 / sum;
  const int64_t start = ((row.batch * a.queries + row.query) * a.heads + row.head) * a.value_dim;
  a.lse[(row.batch * a.heads + row.head) * a.queries + row.query] =
      empty ? -INFINITY : maximum + std::log(sum);
  with_dtype(a.dtype, [&]<class T>() {
    T* to = static_cast<T*>(a.out) + start;
#pragma omp simd
    for (int64_t c = 0; c < a.value_dim; ++c) to[c] = from_float<T>(out[c] * factor);
  });
}

// The rows of a piece in one cache, and their scales.
template <class T>
struct Keys {
  const T* row[kPiece + kSpare];
  float scale[kPiece + kSpare];

  void find(const DecodeAttention& a, const void* cache, const float* scales, const CacheStrides& at,
            const Piece& piece, int64_t head) {
    int64_t found = 0;
    for (int64_t t = piece.begin; t < piece.end;) {
      const Slot slot = slot_of(a.pages, piece.batch, t);
      const int64_t n = std::min(piece.end - t, a.pages.page - t % a.pages.page);
      const int64_t page =
          std::max<int64_t>(0, slot.page);  // a page that does not exist: the first one instead
      const T* start = static_cast<const T*>(cache) + page * at.page + head * at.head + slot.index * at.slot;
      for (int64_t k = 0; k < n; ++k) row[found + k] = start + k * at.slot;
      if (scales) {
        const float* first =
            scales + page * at.scale_page + head * at.scale_head + slot.index * at.scale_slot;
        for (int64_t k = 0; k < n; ++k) scale[found + k] = first[k * at.scale_slot];
      }
      found += n;
      t += n;
    }
    std::fill(row + found, row + found + kSpare, row[std::max<int64_t>(0, found - 1)]);
  }
};

// Rows that are read more than once, or do not end with a whole vector, become float32 first.
template <class T>
struct Widened {
  float* memory;
  const float* row[kTile + kSpare];

  void fill(const T* const* rows, int64_t n, int64_t cols, int64_t ld) {
    for (int64_t k = 0; k < n; ++k) {
      float* to = memory + k * ld;
      int64_t c = 0;
      for (; c + kLanes <= cols; c += kLanes) *reinterpret_cast<Vector*>(to + c) = load_vector(rows[k] + c);
      for (; c < cols; ++c) to[c] = to_float(rows[k][c]);
      for (; c < ld; ++c) to[c] = 0;
      row[k] = to;
    }
    std::fill(row + n, row + n + kSpare, row[n - 1]);
  }
};

template <class T>
int64_t rows_ahead(int64_t cols) {
  return std::clamp<int64_t>(kAheadBytes / (cols * static_cast<int64_t>(sizeof(T))), 1, kSpare - kLine);
}

// q . key, kLanes sums of it. A key is read to its end before the next: by one row of queries the cache is
// read faster than it can be fetched, and the hardware's prefetching follows what is read in order.
template <class T>
Vector products(const float* q, const T* key, int64_t cols) {
  Vector even = {}, odd = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    even += load_vector(q + c) * load_vector(key + c);
    odd += load_vector(q + c + kLanes) * load_vector(key + c + kLanes);
  }
  if (c < cols) even += load_vector(q + c) * load_vector(key + c);
  return even + odd;
}

// s[r * kTile + k] = q_r . keys[k] for n keys and kRowCount rows; whole groups of kLanes keys are computed.
template <int kRowCount, class T>
void score_rows(const float* q, int64_t q_ld, const T* const* keys, int64_t n, int64_t cols, float* s) {
  constexpr int kKeys = kRowCount == 1 ? std::min(8, kLanes) : kRowCount == 2 ? 4 : 2;  // at a time
  const int64_t ahead = rows_ahead<T>(cols);
  for (int64_t group = 0; group < n; group += kLanes) {
    Vector sums[kRowCount][kLanes];
    for (int k = 0; k < kLanes; k += kKeys) {
      const T* const* key = keys + group + k;
      Vector sum[kRowCount][kKeys] = {};
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) prefetch_row(key[i + ahead], cols);
      if constexpr (kRowCount == 1) {
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) sum[0][i] = products(q, key[i], cols);
      } else {
        for (int64_t c = 0; c < cols; c += kLanes) {
          Vector x[kKeys];
#pragma GCC unroll 8
          for (int i = 0; i < kKeys; ++i) x[i] = load_vector(key[i] + c);
#pragma GCC unroll 4
          for (int r = 0; r < kRowCount; ++r) {
            const Vector query = load_vector(q + r * q_ld + c);
#pragma GCC unroll 8
            for (int i = 0; i < kKeys; ++i) sum[r][i] += query * x[i];
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) sums[r][k + i] = sum[r][i];
      }
    }
    for (int r = 0; r < kRowCount; ++r) {
      *reinterpret_cast<Vector*>(s + r * kTile + group) = lane_sums(sums[r]);
    }
  }
}

// out[r * ld + c] += sum_k p[r * kTile + k] * values[k][c], in columns [first, first + kVectors vectors).
template <int kRowCount, int kVectors, class T>
void add_values(const float* p, const T* const* values, int64_t n, int64_t first, float* out, int64_t ld) {
  Vector sum[kRowCount][kVectors] = {};
  const int64_t ahead = rows_ahead<T>(kVectors * kLanes);
  for (int64_t k = 0; k < n; ++k) {
    const T* value = values[k] + first;
    prefetch_row(values[k + ahead] + first, kVectors * kLanes);
    Vector x[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) x[i] = load_vector(value + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRowCount; ++r) {
      const float weight = p[r * kTile + k];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[r][i] += weight * x[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<Vector*>(out + r * ld + first + i * kLanes) += sum[r][i];
    }
  }
}

template <int kRowCount, class T>
void value_rows(const float* p, const T* const* values, int64_t n, int64_t cols, float* out, int64_t ld) {
  constexpr int kVectors = std::min(8, kValueSums / (kRowCount == 3 ? 4 : kRowCount));
  int64_t c = 0;
  for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes) {
    add_values<kRowCount, kVectors>(p, values, n, c, out, ld);
  }
  for (; c < cols; c += kLanes) add_values<kRowCount, 1>(p, values, n, c, out, ld);
}

// Calls f.operator()<N>(r) for blocks of N rows, N <= kRows.
template <class F>
void for_row_blocks(int64_t rows, const F& f) {
  for (int64_t r = 0; r < rows; r += kRows) {
    with_int<1, 2, 3, 4>(static_cast<int>(std::min<int64_t>(kRows, rows - r)),
                         [&]<int kRowCount>() { f.template operator()<kRowCount>(r); });
  }
}

// One piece of one kv head on its way through the tiles.
template <class T>
class PieceTask {
 public:
  PieceTask(const DecodeAttention& a, const Piece& piece, int64_t kv_head)
      : a_(a),
        piece_(piece),
        kv_head_(kv_head),
        rows_(rows_of(a)),
        offset_(length_of(a, piece.batch) - a.queries),
        dim_ld_(round_up(a.dim, kLine)),
        value_ld_(round_up(a.value_dim, kLine)),
        scratch_(rows_ * (dim_ld_ + value_ld_ + kTile) + 2 * round_up(rows_, kLine) +
                 kTile * std::max(dim_ld_, value_ld_)) {
    q_ = scratch_.take(rows_ * dim_ld_);
    out_ = scratch_.take(rows_ * value_ld_);
    s_ = scratch_.take(rows_ * kTile);
    maximum_ = scratch_.take(rows_);
    sum_ = scratch_.take(rows_);
    wide_.memory = scratch_.take(kTile * std::max(dim_ld_, value_ld_));
    load_queries();
    std::fill(out_, out_ + rows_ * value_ld_, 0.0f);
    std::fill(maximum_, maximum_ + rows_, -INFINITY);
    std::fill(sum_, sum_ + rows_, 0.0f);
  }

  void run() {
    if (piece_.begin >= piece_.end) return;
    k_.find(a_, a_.k, a_.k_scales, a_.k_at, piece_, kv_head_);
    v_.find(a_, a_.v, a_.v_scales, a_.v_at, piece_, kv_head_);
    const int64_t keys = piece_.end - piece_.begin;
    for (int64_t first = 0; first < keys; first += kTile) {
      const int64_t n = std::min(kTile, keys - first);
      score_tile(first, n);
      for (int64_t r = 0; r < rows_; ++r) softmax_row(r, first, n);
      value_tile(first, n);
    }
  }

  void finish(const Partials& partials) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* out = out_ + r * value_ld_;
      if (piece_.partial < 0) {
        store(a_, row_of(a_, piece_.batch, kv_head_, r), out, maximum_[r], sum_[r]);
        continue;
      }
      float* to = partials.row(piece_.partial + kv_head_, r);
      std::copy(out, out + a_.value_dim, to);
      to[a_.value_dim] = maximum_[r];
      to[a_.value_dim + 1] = sum_[r];
    }
  }

 private:
  void load_queries() {
    for (int64_t r = 0; r < rows_; ++r) {
      const Row row = row_of(a_, piece_.batch, kv_head_, r);
      const int64_t start = row.batch * a_.q_batch + row.head * a_.q_head + row.query * a_.q_query;
      float* to = q_ + r * dim_ld_;
      with_dtype(a_.dtype, [&]<class Q>() { load_row(static_cast<const Q*>(a_.q) + start, a_.dim, to); });
      std::fill(to + a_.dim, to + dim_ld_, 0.0f);
    }
  }

  bool widens(int64_t cols) const {
    return cols % kLanes != 0 || (!std::is_same_v<T, float> && rows_ > kRows);
  }

  void score_tile(int64_t first, int64_t n) {
    const auto score = [&](auto* const* keys, int64_t cols) {
      for_row_blocks(rows_, [&]<int kRowCount>(int64_t r) {
        score_rows<kRowCount>(q_ + r * dim_ld_, dim_ld_, keys, n, cols, s_ + r * kTile);
      });
    };
    if (!widens(a_.dim)) return score(k_.row + first, a_.dim);
    wide_.fill(k_.row + first, n, a_.dim, dim_ld_);
    score(wide_.row, dim_ld_);
  }

  void value_tile(int64_t first, int64_t n) {
    const auto add = [&](auto* const* values, int64_t cols) {
      for_row_blocks(rows_, [&]<int kRowCount>(int64_t r) {
        value_rows<kRowCount>(s_ + r * kTile, values, n, cols, out_ + r * value_ld_, value_ld_);
      });
    };
    if (!widens(a_.value_dim)) return add(v_.row + first, a_.value_dim);
    wide_.fill(v_.row + first, n, a_.value_dim, value_ld_);
    add(wide_.row, value_ld_);
  }

  // s = q . k becomes the score of query i and key j, j the first of n keys.
  void adjust(const Row& row, int64_t j, int64_t first, int64_t n, float* s) const {
    const float scale = a_.scale;
    if (a_.k_scales) {
      const float* scales = k_.scale + first;
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) s[k] *= scales[k];
    }
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) s[k] *= scale;
    if (a_.softcap > 0) {
      const float softcap = a_.softcap, inverse = 1 / softcap;
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) s[k] = softcap * tanh(s[k] * inverse);
    }
    if (a_.alibi_slopes) {
      const float slope = a_.alibi_slopes[row.batch * a_.alibi_batch + row.head * a_.alibi_head];
      const float distance = static_cast<float>(row.query + offset_ - j);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) s[k] -= slope * std::fabs(distance - static_cast<float>(k));
    }
  }

  // Scores [first, first + n) of a row become exp(s - maximum), 0 where the row does not attend; out and sum
  // follow the new maximum; weights are multiplied by their values' scales.
  void softmax_row(int64_t r, int64_t first, int64_t n) {
    const Row row = row_of(a_, piece_.batch, kv_head_, r);
    const int64_t j = piece_.begin + first, own = row.query + offset_;
    float* s = s_ + r * kTile;
    adjust(row, j, first, n, s);
    const int64_t end = std::clamp<int64_t>(own + 1 - j, 0, n), whole = round_up(n, kLine);
    const int64_t begin = a_.left < 0 ? 0 : std::clamp<int64_t>(own - a_.left - j, 0, end);
    std::fill(s, s + begin, -INFINITY);
    std::fill(s + end, s + whole, -INFINITY);

    const float before = maximum_[r];
    float top = before;
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < whole; ++k) top = s[k] > top ? s[k] : top;
    const float shift = top == -INFINITY ? 0 : top;
    float added = 0;
#pragma omp simd reduction(+ : added)
    for (int64_t k = 0; k < whole; ++k) {
      s[k] = exp_nonpositive(s[k] - shift);
      added += s[k];
    }
    if (top != before) {
      const float factor = exp(before - shift);
      float* out = out_ + r * value_ld_;
      sum_[r] *= factor;
#pragma omp simd
      for (int64_t c = 0; c < value_ld_; ++c) out[c] *= factor;
    }
    maximum_[r] = top;
    sum_[r] += added;
    if (!a_.v_scales) return;
    const float* scales = v_.scale + first;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) s[k] *= scales[k];
  }

  const DecodeAttention& a_;
  const Piece& piece_;
  const int64_t kv_head_, rows_, offset_, dim_ld_, value_ld_;
  Scratch scratch_;
  float *q_, *out_, *s_, *maximum_, *sum_;
  Keys<T> k_, v_;
  Widened<T> wide_;
};

// Every sequence's keys, those before the window left out, in pieces; an empty sequence has one empty piece.
std::vector<Piece> pieces_of(const DecodeAttention& a, int64_t* partials) {
  std::vector<Piece> pieces;
  *partials = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t end = length_of(a, b);
    const int64_t begin = a.left < 0 ? 0 : std::clamp<int64_t>(end - a.queries - a.left, 0, end);
    const bool alone = end - begin <= kPiece;
    int64_t j = begin;
    do {
      pieces.push_back({b, j, std::min(end, j + kPiece), alone ? -1 : *partials});
      if (!alone) *partials += a.kv_heads;
      j += kPiece;
    } while (j < end);
  }
  return pieces;
}

// out and lse of the sequence whose pieces are [first, end), from what they left.
void merge(const DecodeAttention& a, const Partials& partials, const Piece* first, const Piece* end,
           int64_t kv_head) {
  const Floats out = make_floats(a.value_dim);
  for (int64_t r = 0; r < partials.rows; ++r) {
    float top = -INFINITY, sum = 0;
    for (const Piece* piece = first; piece < end; ++piece) {
      top = std::max(top, partials.row(piece->partial + kv_head, r)[a.value_dim]);
    }
    const float shift = top == -INFINITY ? 0 : top;
    std::fill(out.get(), out.get() + a.value_dim, 0.0f);
    for (const Piece* piece = first; piece < end; ++piece) {
      const float* from = partials.row(piece->partial + kv_head, r);
      const float factor = exp(from[a.value_dim] - shift);
      sum += factor * from[a.value_dim + 1];
#pragma omp simd
      for (int64_t c = 0; c < a.value_dim; ++c) out[c] += factor * from[c];
    }
    store(a, row_of(a, first->batch, kv_head, r), out.get(), top, sum);
  }
}

// The first piece of each sequence that has several, and one past the last of all.
std::vector<const Piece*> split_sequences(const std::vector<Piece>& pieces) {
  std::vector<const Piece*> firsts;
  for (const Piece& piece : pieces) {
    const bool first = &piece == pieces.data() || (&piece - 1)->batch != piece.batch;
    if (first && piece.partial >= 0) firsts.push_back(&piece);
  }
  return firsts;
}

void merge_all(const Context& context, const DecodeAttention& a, const std::vector<Piece>& pieces,
               const Partials& partials) {
  const std::vector<const Piece*> firsts = split_sequences(pieces);
  const int64_t count = static_cast<int64_t>(firsts.size());
  parallel_tasks(context, count, [&](int64_t index) {
    const Piece *first = firsts[static_cast<size_t>(index)], *end = first;
    while (end < pieces.data() + pieces.size() && end->batch == first->batch) ++end;
    for (int64_t head = 0; head < a.kv_heads; ++head) merge(a, partials, first, end, head);
  });
}

template <class T>
void run(const Context& context, const DecodeAttention& a) {
  int64_t count;
  const std::vector<Piece> pieces = pieces_of(a, &count);
  int64_t longest = 1;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.end - piece.begin);
  const Partials partials = {rows_of(a), a.value_dim + 2,
                             make_floats(count * rows_of(a) * (a.value_dim + 2))};
  const int64_t items = static_cast<int64_t>(pieces.size()) * a.kv_heads;
  const int64_t bytes = longest * (a.dim + a.value_dim) * static_cast<int64_t>(sizeof(T));
  const int64_t step = std::max<int64_t>(1, kTaskBytes / bytes);
  parallel_tasks(context, divide_up(items, step), [&](int64_t task) {
    for (int64_t item = task * step; item < std::min(items, (task + 1) * step); ++item) {
      PieceTask<T> piece(a, pieces[static_cast<size_t>(item / a.kv_heads)], item % a.kv_heads);
      piece.run();
      piece.finish(partials);
    }
  });
  if (count > 0) merge_all(context, a, pieces, partials);
}

}  // namespace

void decode_attention(const Context& context, const DecodeAttention& a) {
  if (a.batch * a.heads * a.queries == 0) return;
  if (a.quantised) return run<int8_t>(context, a);
  with_dtype(a.dtype, [&]<class T>() { run<T>(context, a); });
}

}  // namespace fastlm
