#include "attention.h"

#if !defined(FASTLM_GPU)
#include <vector>
#endif

namespace fastlm::of_attention_varlen {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Where sequences start: `data`, for the kernels. Nothing outside the tensors is ever read or written.
#if defined(FASTLM_GPU)
// As it was given: its values are in the GPU's memory, and the kernels see to them and to what they leave
// out.
struct Starts {
  Tensor given;
  const int32_t* data() const { return given.const_data_ptr<int32_t>(); }
};

Starts starts_of(const Tensor& cu_seqlens, int64_t) { return {cu_seqlens.contiguous()}; }

void fill_outside(const Tensor& t, int64_t, const Starts& starts, double value) {
  if (starts.given.numel() <= 1) t.fill_(value);  // no sequence, no kernel
}
#else
using Starts = std::vector<int32_t>;

// Ascending within [0, tokens] whatever was given.
Starts starts_of(const Tensor& cu_seqlens, int64_t tokens) {
  const Tensor given_starts = cu_seqlens.contiguous();
  const int32_t* values = given_starts.const_data_ptr<int32_t>();
  Starts made(values, values + given_starts.numel());
  int32_t last = 0;
  const int32_t most = static_cast<int32_t>(std::min<int64_t>(tokens, INT32_MAX));
  for (int32_t& start : made) start = last = std::clamp(start, last, most);
  return made;
}

// Fills what is of no sequence along `axis`, which runs over tokens.
void fill_outside(const Tensor& t, int64_t axis, const Starts& starts, double value) {
  const int64_t begin = starts.front(), end = starts.back(), tokens = t.size(axis);
  if (begin > 0) t.narrow(axis, 0, begin).fill_(value);
  if (end < tokens) t.narrow(axis, end, tokens - end).fill_(value);
}
#endif

// The arguments of both directions as those of the attention kernels, and what keeps them alive.
struct Packed {
  Starts q_starts, k_starts;
  Inputs inputs;
};

Packed packed_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                 const Tensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double scale, bool top_left,
                 int64_t left, int64_t right, double softcap, const OptionalTensor& slopes, double dropout_p,
                 const OptionalTensor& seed) {
  Packed made = {starts_of(cu_seqlens_q, q.size(0)), starts_of(cu_seqlens_k, k.size(0)),
                 inputs_of(q, k, v, {}, {}, {}, scale, 0, left, right, softcap, {}, dropout_p, seed)};
  AttentionInputs& in = made.inputs.in;
  in.batch = cu_seqlens_q.size(0) - 1;
  in.bottom_right = !top_left;
  in.longest_q = max_q;
  in.longest_k = max_k;
  in.q.starts = made.q_starts.data();
  in.k.starts = in.v.starts = made.k_starts.data();
  if (given(slopes)) {
    in.alibi_slopes = slopes->const_data_ptr<float>();
    broadcast_strides(*slopes, {in.batch, in.heads}, in.alibi_strides);
  }
  return made;
}

Two forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
            const Tensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double scale, bool top_left,
            int64_t left, int64_t right, double softcap, const OptionalTensor& alibi_slopes, double dropout_p,
            const OptionalTensor& seed) {
  const Packed packed = packed_of(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, top_left, left,
                                  right, softcap, alibi_slopes, dropout_p, seed);
  const Tensor out = new_tensor({q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  const Tensor lse = float_output({q.size(1), q.size(0)}, q);
  fill_outside(out, 0, packed.q_starts, 0);
  fill_outside(lse, 1, packed.q_starts, -INFINITY);
  attention_forward(context_of(q), {packed.inputs.in, out.mutable_data_ptr(), lse.mutable_data_ptr<float>()});
  return {out, lse};
}

// A gradient of t, zero outside the sequences.
Tensor gradient_like(const Tensor& t, const Starts& starts, bool wanted) {
  const Tensor made = output_like(t, wanted);
  if (wanted) fill_outside(made, 0, starts, 0);
  return made;
}

Three backward(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
               const Tensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double scale, bool top_left,
               int64_t left, int64_t right, double softcap, const OptionalTensor& alibi_slopes,
               double dropout_p, const OptionalTensor& seed, const std::array<bool, 3>& needs) {
  const Packed packed = packed_of(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, top_left, left,
                                  right, softcap, alibi_slopes, dropout_p, seed);
  const Tensor dq = gradient_like(q, packed.q_starts, needs[0]);
  const Tensor dk = gradient_like(k, packed.k_starts, needs[1]);
  const Tensor dv = gradient_like(v, packed.k_starts, needs[2]);
  const Tensor gradient = given(dout) ? readable(*dout) : Tensor(),
               dsums = given(dlse) ? dlse->contiguous() : Tensor();
  AttentionBackward f = {.in = packed.inputs.in,
                         .dout = given(dout) ? heads_of(gradient) : Heads{},
                         .dlse = given(dlse) ? dsums.const_data_ptr<float>() : nullptr,
                         .dq = data_or_null(dq),
                         .dk = data_or_null(dk),
                         .dv = data_or_null(dv),
                         .dbias = nullptr,
                         .dbias_strides = {}};
  const RowsOfLse rows(f, out, lse);
  f.dout.starts = f.in.q.starts;
  attention_backward(context_of(q), f);
  return {dq, dk, dv};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("attention_varlen." BACKEND, &forward);
  m.impl("attention_varlen_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_attention_varlen
