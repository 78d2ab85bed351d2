// What the bindings of attention's ops share: tensors [batch, heads, seq, dim], or packed ones, [tokens,
// heads, dim], to AttentionInputs.
#pragma once

#include "../contract/attention.h"
#include "tensors.h"

namespace fastlm {

// Read in place where the last dimension is contiguous: slices of a packed projection, transposed heads. A
// GPU copies 16 bytes at a time, so there rows that do not begin at a multiple of these are copied, too.
inline Tensor readable(const Tensor& t) {
#if defined(FASTLM_GPU)
  const int64_t unit = 16 / static_cast<int64_t>(t.element_size());
  bool aligned = t.stride(-1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < t.dim() - 1; ++d) aligned &= t.size(d) == 1 || t.stride(d) % unit == 0;
  return aligned ? t : t.clone(at::MemoryFormat::Contiguous);
#else
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
#endif
}

// Where the rows of packed sequences start is for the caller to add.
inline Heads heads_of(const Tensor& t) {
  if (t.dim() == 3) return {t.const_data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The strides of t along sizes that it is broadcast to.
inline void broadcast_strides(const Tensor& t, at::IntArrayRef sizes, int64_t* strides) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    const int64_t i = static_cast<int64_t>(d);
    strides[d] = t.size(i) == 1 && sizes[d] != 1 ? 0 : t.stride(i);
  }
}

// The arguments that both directions share, and what keeps their copies alive; of packed sequences without
// their number, starts and slopes.
struct Inputs {
  Tensor q, k, v, lengths;
  AttentionInputs in;
};

inline Inputs inputs_of(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask,
                        const OptionalTensor& bias, const OptionalTensor& kv_lengths, double scale,
                        int64_t offset, int64_t left, int64_t right, double softcap,
                        const OptionalTensor& slopes, double dropout_p, const OptionalTensor& seed) {
  Inputs made = {
      readable(q_), readable(k_), readable(v_), given(kv_lengths) ? kv_lengths->contiguous() : Tensor(), {}};
  const Tensor &q = made.q, &k = made.k, &v = made.v;
  const int64_t seq = q.dim() == 3 ? 0 : 2;
  AttentionInputs& in = made.in;
  in = {.dtype = dtype_of(q),
        .batch = q.size(0),
        .heads = q.size(1),
        .kv_heads = k.size(1),
        .queries = q.size(seq),
        .keys = k.size(seq),
        .dim = q.size(-1),
        .value_dim = v.size(-1),
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
        .bottom_right = false,
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

// What only kernels need that do not see a query's keys all at once: forward's results, out with its heads
// side by side, and their notes of each row. Keeps copies alive.
struct RowsOfLse {
#if defined(FASTLM_GPU)
  Tensor out, lse, rows;

  RowsOfLse(AttentionBackward& f, const Tensor& out_, const Tensor& lse_)
      : out(out_.contiguous()), lse(lse_.contiguous()), rows(new_tensor({3, lse.numel()}, at::kFloat)) {
    f.out = out.const_data_ptr();
    f.lse = lse.const_data_ptr<float>();
    f.rows = rows.mutable_data_ptr<float>();
  }
#else
  RowsOfLse(AttentionBackward&, const Tensor&, const Tensor&) {}
#endif
};

}  // namespace fastlm
