#include "attention.h"

#include <ATen/ops/zeros.h>

namespace fastlm::of_attention {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A new tensor [batch, heads, seq, dim] that is contiguous as [batch, seq, heads, dim].
Tensor heads_output(at::IntArrayRef sizes, const Tensor& like, bool wanted = true) {
  if (!wanted) return new_tensor({0}, like.scalar_type());
  const int64_t token = std::max<int64_t>(1, sizes[1]) * sizes[3];
  const int64_t strides[] = {std::max<int64_t>(1, sizes[2]) * token, sizes[3], token, 1};
  return empty_strided_tensor(sizes, strides, like.scalar_type());
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

Four backward(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& mask,
              const OptionalTensor& bias, const OptionalTensor& kv_lengths, double scale, int64_t offset,
              int64_t left, int64_t right, double softcap, const OptionalTensor& alibi_slopes,
              double dropout_p, const OptionalTensor& seed, const std::array<bool, 4>& needs) {
  const Inputs inputs = inputs_of(q, k, v, mask, bias, kv_lengths, scale, offset, left, right, softcap,
                                  alibi_slopes, dropout_p, seed);
  const Tensor dq = heads_output(q.sizes(), q, needs[0]), dk = heads_output(k.sizes(), k, needs[1]);
  const Tensor dv = heads_output(v.sizes(), v, needs[2]);
  const bool wanted = needs[3] && given(bias);
  const Tensor dbias = wanted ? at::zeros(bias->sizes(), lse.options()) : Tensor();
  // One sum of over 200 heads is further off than the 2x rule allows.
  const bool many = wanted && q.size(0) * q.size(1) > 32 * bias->size(0) * bias->size(1);
  const Tensor lost = many ? at::zeros(bias->sizes(), lse.options()) : Tensor();
  const Tensor gradient = given(dout) ? readable(*dout) : Tensor(),
               dsums = given(dlse) ? dlse->contiguous() : Tensor();
  AttentionBackward f = {.in = inputs.in,
                         .dout = given(dout) ? heads_of(gradient) : Heads{},
                         .dlse = given(dlse) ? dsums.const_data_ptr<float>() : nullptr,
                         .dq = data_or_null(dq),
                         .dk = data_or_null(dk),
                         .dv = data_or_null(dv),
                         .dbias = wanted ? floats_or_null(dbias) : nullptr,
                         .dbias_lost = many ? floats_or_null(lost) : nullptr,
                         .dbias_strides = {}};
  const RowsOfLse rows(f, out.transpose(1, 2), lse);
  if (wanted) broadcast_strides(dbias, {q.size(0), q.size(1), q.size(2), k.size(2)}, f.dbias_strides);
  attention_backward(context_of(q), f);
  return {dq, dk, dv, wanted ? dbias.to(bias->scalar_type()) : new_tensor({0}, q.scalar_type())};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("attention." BACKEND, &forward);
  m.impl("attention_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_attention
