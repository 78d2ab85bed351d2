// The usual calls of ops on heads. Each condition is that of check() in fastlm/_ops/<op>.py.
#include "usual_calls.h"

namespace fastlm::usual {
namespace {

constexpr int64_t kLargestHead = 512;  // LARGEST_HEAD in fastlm/_ops/attention.py

// [batch, heads, seq, dim], or with 3 axes packed sequences, [tokens, heads, dim].
const Tensor* heads(PyObject* object, int64_t axes = 4) {
  const Tensor* t = floating(object);
  return t && t->dim() == axes && t->size(-1) > 0 && t->size(-1) <= kLargestHead ? t : nullptr;
}

// Keys k [n,Hkv,S,D] and values v [n,Hkv,S,Dv] for queries q [B,H,Sq,D], n being B; packed ones alike.
bool fit(const Tensor* q, const Tensor* k, const Tensor* v) {
  if (!q || !k || !v || k->scalar_type() != q->scalar_type() || v->scalar_type() != q->scalar_type())
    return false;
  const int64_t last = q->dim() - 1;
  if ((last == 3 && k->size(0) != q->size(0)) || k->size(last) != q->size(last)) return false;
  return k->size(1) != 0 && q->size(1) % k->size(1) == 0 &&
         v->sizes().slice(0, last) == k->sizes().slice(0, last);
}

// A length for each sequence, in [0, most].
bool lengths_fit(const Tensor* lengths, int64_t batch, int64_t most) {
  if (!lengths || lengths->dim() != 1 || lengths->size(0) != batch) return false;
  const int32_t* values = lengths->const_data_ptr<int32_t>();
  return std::all_of(values, values + batch, [most](int32_t n) { return n >= 0 && n <= most; });
}

// Where sequences start: from 0 to `tokens`, never decreasing, no step above `limit`, which is kept in *most.
bool starts_fit(const Tensor* starts, int64_t tokens, PyObject* limit, int64_t* most) {
  if (!starts || starts->dim() != 1 || starts->size(0) == 0) return false;
  if (!integer(limit, most) || *most < 0) return false;
  const int32_t *values = starts->const_data_ptr<int32_t>(), *last = values + starts->size(0) - 1;
  const auto too_far = [most = *most](int32_t start, int32_t end) {
    return end < start || int64_t{end} - start > most;
  };
  return *values == 0 && *last == tokens && std::adjacent_find(values, last + 1, too_far) == last + 1;
}

// None, which is dim ** -0.5, or a number.
bool score_scale(PyObject* object, int64_t dim, double* to) {
  if (object != Py_None) return number(object, to);
  *to = std::pow(static_cast<double>(dim), -0.5);
  return true;
}

// Whether the first query stands beside the first key, not the last beside the last, and how many keys to the
// right of its own a query sees. `same`: there are as many keys; where causal=True leaves it open which
// stands beside which, Python says so.
bool diagonal(PyObject* causal, bool same, bool* top_left, int64_t* right) {
  const std::string_view name = text(causal);
  *top_left = name == "top_left";
  *right = causal == Py_False ? -1 : 0;
  return causal == Py_False || (causal == Py_True && same) || *top_left || name == "bottom_right";
}

// cos or sin beside x [B,H,S,D]; no gradient goes to it.
bool is_table(const Tensor* t, const Tensor& x) {
  if (!t || (t->dim() != 2 && t->dim() != 3) || t->requires_grad()) return false;
  if (t->scalar_type() != x.scalar_type() && t->scalar_type() != at::kFloat) return false;
  const int64_t n = t->size(-1);
  if (t->size(-2) != x.size(2) || n < 2 || n > x.size(3) || n % 2 != 0) return false;
  return t->dim() == 2 || t->size(0) == 1 || t->size(0) == x.size(0);
}

}  // namespace

// x, cos, sin, interleaved
PyObject* rotated(Arguments a) {
  static const auto op = kernel<Tensor(const Tensor&, const Tensor&, const Tensor&, bool)>("fastlm::rope");
  const Tensor *in = floating(a[0]), *cosines = floating(a[1]), *sines = floating(a[2]);
  bool interleaved;
  if (!in || in->dim() != 4 || !is_table(cosines, *in) || !is_table(sines, *in)) return unusual();
  if (!alike(sines, *cosines) || !boolean(a[3], &interleaved)) return unusual();
  const Tensor x = *in, cos = *cosines, sin = *sines;
  Tensor y = run(op, needs_graph(x), x, cos, sin, interleaved);
  return wrapped(y);
}

// q, k, v, causal, mask, bias, kv_lengths, scale, window, softcap, alibi_slopes, dropout_p, seed, return_lse
PyObject* attended(Arguments a) {
  static const auto op = kernel<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, double, int64_t, int64_t, int64_t, double, const OptionalTensor&, double,
      const OptionalTensor&)>("fastlm::attention");
  const Tensor *queries = heads(a[0]), *keys = heads(a[1]), *values = heads(a[2]);
  double scale;
  int64_t right;
  bool top_left, with_lse;
  if (!fit(queries, keys, values)) return unusual();
  const int64_t ahead = keys->size(2) - queries->size(2);
  if (!diagonal(a[3], ahead == 0, &top_left, &right)) return unusual();
  if (a[4] != Py_None || a[5] != Py_None || a[8] != Py_None || a[10] != Py_None) return unusual();
  if (!score_scale(a[7], queries->size(3), &scale) || !zero(a[9])) return unusual();
  DropoutArguments drop;
  if (!dropout(a[11], a[12], &drop) || !boolean(a[13], &with_lse)) return unusual();
  OptionalTensor lengths, none;
  if (a[6] != Py_None) {
    const Tensor* given_lengths = integers(a[6], at::kInt);
    if (!lengths_fit(given_lengths, queries->size(0), keys->size(2))) return unusual();
    lengths = *given_lengths;
  }
  const Tensor q = *queries, k = *keys, v = *values;
  auto [out, lse] = run(op, needs_graph(q, k, v), q, k, v, none, none, lengths, scale, top_left ? 0 : ahead,
                        int64_t{-1}, right, 0.0, none, drop.p, drop.seed());
  return with_lse ? wrapped(out, lse) : wrapped(out);
}

// q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale, window, softcap, alibi_slopes, dropout_p,
// seed, return_lse
PyObject* attended_packed(Arguments a) {
  static const auto op = kernel<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double,
      bool, int64_t, int64_t, double, const OptionalTensor&, double, const OptionalTensor&)>(
      "fastlm::attention_varlen");
  const Tensor *queries = heads(a[0], 3), *keys = heads(a[1], 3), *values = heads(a[2], 3);
  const Tensor *q_starts = integers(a[3], at::kInt), *k_starts = integers(a[4], at::kInt);
  double scale;
  int64_t max_q, max_k, right;
  bool top_left, with_lse;
  if (!fit(queries, keys, values)) return unusual();
  if (!starts_fit(q_starts, queries->size(0), a[5], &max_q)) return unusual();
  if (!starts_fit(k_starts, keys->size(0), a[6], &max_k) || k_starts->size(0) != q_starts->size(0))
    return unusual();
  if (!diagonal(a[7], a[3] == a[4], &top_left, &right)) return unusual();
  if (a[9] != Py_None || a[11] != Py_None || !score_scale(a[8], queries->size(2), &scale)) return unusual();
  DropoutArguments drop;
  if (!zero(a[10]) || !dropout(a[12], a[13], &drop) || !boolean(a[14], &with_lse)) return unusual();
  const Tensor q = *queries, k = *keys, v = *values, cu_q = *q_starts, cu_k = *k_starts;
  const OptionalTensor none;
  auto [out, lse] = run(op, needs_graph(q, k, v), q, k, v, cu_q, cu_k, max_q, max_k, scale, top_left,
                        int64_t{-1}, right, 0.0, none, drop.p, drop.seed());
  return with_lse ? wrapped(out, lse) : wrapped(out);
}

// q, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale, scale, window, softcap, alibi_slopes,
// return_lse
PyObject* decoded(Arguments a) {
  static const auto op = kernel<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, double, int64_t, double, const OptionalTensor&)>(
      "fastlm::decode_attention");
  const Tensor *queries = heads(a[0]), *keys = heads(a[1]), *values = heads(a[2]);
  const Tensor* held = integers(a[3], at::kInt);
  double scale;
  bool with_lse;
  if (!fit(queries, keys, values) || !lengths_fit(held, queries->size(0), keys->size(2))) return unusual();
  if (a[4] != Py_None || a[5] != Py_None || a[6] != Py_None || a[8] != Py_None || a[10] != Py_None)
    return unusual();
  if (!score_scale(a[7], queries->size(3), &scale) || !zero(a[9]) || !boolean(a[11], &with_lse))
    return unusual();
  const Tensor q = *queries, k = *keys, v = *values, lengths = *held;
  if (needs_graph(q, k, v)) return unusual();  // there is no backward, and Python says so
  const OptionalTensor none;
  auto [out, lse] = run(op, false, q, k, v, lengths, none, none, none, scale, int64_t{-1}, 0.0, none);
  return with_lse ? wrapped(out, lse) : wrapped(out);
}

// k, v, k_cache, v_cache, kv_lengths, block_table, k_scale, v_scale; returns True once it is done
PyObject* appended(Arguments a) {
  static const auto op =
      kernel<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const OptionalTensor&, const OptionalTensor&, const OptionalTensor&)>("fastlm::append_kv");
  const Tensor *keys = floating(a[0]), *values = floating(a[1]);
  const Tensor *k_to = floating(a[2]), *v_to = floating(a[3]), *held = integers(a[4], at::kInt);
  if (!keys || !values || !k_to || !v_to || a[5] != Py_None || a[6] != Py_None || a[7] != Py_None)
    return unusual();
  for (const Tensor* t : {keys, values, k_to, v_to}) {
    if (t->dim() != 4 || t->scalar_type() != keys->scalar_type() || t->size(0) != keys->size(0))
      return unusual();
  }
  for (const Tensor* t : {k_to, v_to}) {
    if (t->size(3) == 0 || (t->stride(3) != 1 && t->size(3) != 1)) return unusual();
  }
  const int64_t tokens = keys->size(2), heads = k_to->size(1), slots = k_to->size(2);
  if (v_to->size(1) != heads || v_to->size(2) != slots || values->size(2) != tokens) return unusual();
  if (keys->size(1) != heads || values->size(1) != heads) return unusual();
  if (keys->size(3) != k_to->size(3) || values->size(3) != v_to->size(3)) return unusual();
  if (!lengths_fit(held, keys->size(0), slots - tokens)) return unusual();
  const Tensor k = *keys, v = *values, k_cache = *k_to, v_cache = *v_to, lengths = *held;
  if (needs_graph(k, v, k_cache, v_cache)) return unusual();  // as above
  const OptionalTensor none;
  run(op, true, k, v, k_cache, v_cache, lengths, none, none, none);
  Py_RETURN_TRUE;
}

}  // namespace fastlm::usual
