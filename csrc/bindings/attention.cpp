#include "../contract/attention.h"

#include <ATen/ops/zeros.h>

#include "tensors.h"

namespace fastlm {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Read in place where the last dimension is contiguous: slices of a packed projection, transposed heads.
Tensor readable(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous(); }

Heads heads_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// A new tensor that is contiguous as [batch, seq, heads, dim], seen as [batch, heads, seq, dim].
Tensor heads_output(at::IntArrayRef sizes, const Tensor& like, bool wanted = true) {
  if (!wanted) return new_tensor({0}, like.scalar_type());
  return new_tensor({sizes[0], sizes[2], sizes[1], sizes[3]}, like.scalar_type()).transpose(1, 2);
}

// The strides of t along sizes that it is broadcast to.
void broadcast_strides(const Tensor& t, at::IntArrayRef sizes, int64_t* strides) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    const int64_t i = static_cast<int64_t>(d);
    strides[d] = t.size(i) == 1 && sizes[d] != 1 ? 0 : t.stride(i);
  }
}

// The arguments that both directions share, and what keeps their copies alive.
struct Inputs {
  Tensor q, k, v, lengths;
  AttentionInputs in;
};

Inputs inputs_of(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask,
                 const OptionalTensor& bias, const OptionalTensor& kv_lengths, double scale, int64_t offset,
                 int64_t left, int64_t right, double softcap, const OptionalTensor& slopes, double dropout_p,
                 const OptionalTensor& seed) {
  Inputs made = {
      readable(q_), readable(k_), readable(v_), given(kv_lengths) ? kv_lengths->contiguous() : Tensor(), {}};
  const Tensor &q = made.q, &k = made.k, &v = made.v;
  AttentionInputs& in = made.in;
  in = {.dtype = dtype_of(q),
        .batch = q.size(0),
        .heads = q.size(1),
        .kv_heads = k.size(1),
        .queries = q.size(2),
        .keys = k.size(2),
        .dim = q.size(3),
        .value_dim = v.size(3),
        .q = heads_of(q),
        .k = heads_of(k),
        .v = heads_of(v),
        .mask = nullptr,
        .mask_strides = {},
        .bias_dtype = DType::kFloat32,
        .bias = nullptr,
        .bias_strides = {},
        .kv_lengths = nullptr,
        .scale = static_cast<float>(scale),
        .offset = offset,
        .left = left,
        .right = right,
        .softcap = static_cast<float>(softcap),
        .alibi_slopes = nullptr,
        .alibi_strides = {},
        .dropout = dropout_of(dropout_p, seed)};
  const std::array<int64_t, 4> scores = {in.batch, in.heads, in.queries, in.keys};
  if (given(mask)) {
    in.mask = mask->const_data_ptr<bool>();
    broadcast_strides(*mask, scores, in.mask_strides);
  }
  if (given(bias)) {
    in.bias = bias->const_data_ptr();
    in.bias_dtype = dtype_of(*bias);
    broadcast_strides(*bias, scores, in.bias_strides);
  }
  if (given(kv_lengths)) in.kv_lengths = made.lengths.const_data_ptr<int32_t>();
  if (given(slopes)) {
    in.alibi_slopes = slopes->const_data_ptr<float>();
    broadcast_strides(*slopes, {in.batch, in.heads}, in.alibi_strides);
  }
  return made;
}

Two forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
            const OptionalTensor& bias, const OptionalTensor& kv_lengths, double scale, int64_t offset,
            int64_t left, int64_t right, double softcap, const OptionalTensor& alibi_slopes, double dropout_p,
            const OptionalTensor& seed) {
  const Inputs inputs = inputs_of(q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap,
                                  alibi_slopes, dropout_p, seed);
  const Tensor out = heads_output({q.size(0), q.size(1), q.size(2), v.size(3)}, q);
  const Tensor lse = float_output({q.size(0), q.size(1), q.size(2)}, q);
  attention_forward(context_of(q), {inputs.in, out.mutable_data_ptr(), lse.mutable_data_ptr<float>()});
  return {out, lse};
}

// out and the values of lse are for kernels that do not see a query's keys all at once.
Four backward(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor&, const Tensor& lse, const OptionalTensor& mask,
              const OptionalTensor& bias, const OptionalTensor& kv_lengths, double scale, int64_t offset,
              int64_t left, int64_t right, double softcap, const OptionalTensor& alibi_slopes,
              double dropout_p, const OptionalTensor& seed, const std::array<bool, 4>& needs) {
  const Inputs inputs = inputs_of(q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap,
                                  alibi_slopes, dropout_p, seed);
  const Tensor dq = heads_output(q.sizes(), q, needs[0]), dk = heads_output(k.sizes(), k, needs[1]);
  const Tensor dv = heads_output(v.sizes(), v, needs[2]);
  const bool wanted = needs[3] && given(bias);
  const Tensor dbias = at::zeros(wanted ? bias->sizes() : at::IntArrayRef{0}, lse.options());
  const Tensor gradient = given(dout) ? readable(*dout) : Tensor(),
               dsums = given(dlse) ? dlse->contiguous() : Tensor();
  AttentionBackward f = {.in = inputs.in,
                         .dout = given(dout) ? heads_of(gradient) : Heads{},
                         .dlse = given(dlse) ? dsums.const_data_ptr<float>() : nullptr,
                         .dq = data_or_null(dq),
                         .dk = data_or_null(dk),
                         .dv = data_or_null(dv),
                         .dbias = floats_or_null(dbias),
                         .dbias_strides = {}};
  if (wanted) broadcast_strides(dbias, {q.size(0), q.size(1), q.size(2), k.size(2)}, f.dbias_strides);
  attention_backward(context_of(q), f);
  return {dq, dk, dv, wanted ? dbias.to(bias->scalar_type()) : new_tensor({0}, q.scalar_type())};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("attention." BACKEND, &forward);
  m.impl("attention_backward." BACKEND, &backward);
}

}  // namespace fastlm
