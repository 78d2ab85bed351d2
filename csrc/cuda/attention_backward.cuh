// What the kernels of attention's backward share, dense and packed: a number has one writer, so no sum needs
// atomics.
//
// With dp_ij = dout_i . v_j (dropped as p was), delta_i = sum_j p_ij dp_ij = dout_i . out_i:
// ds_ij = p_ij (dp_ij - delta_i + dlse_i); through softcap times 1 - tanh^2; dq_i = scale * sum_j ds_ij k_j;
// dk_j = scale * sum_i ds_ij q_i; dv_j = sum_i p_ij dout_i; dbias = ds, summed where bias is broadcast.
//
// Three kernels, p computed anew in each: dq, which leaves for the others what rows of scores become weights
// by; dk and dv; dbias. A block's own rows stay in shared memory, tiles of the others come by cp.async one
// step ahead. Bound: 14 * dim FLOPs a pair, where one kernel with atomics has 10; if exact 18: then delta and
// the sum of p come from the very dp and scores that they meet, as delta from a rounded out is too coarse for
// float32 gradients (of one key ds must be 0). Source: Dao, "FlashAttention-2",
// https://arxiv.org/abs/2307.08691.
#pragma once

#include "attention.cuh"

namespace fastlm {

// dk and dv, either of which may not be wanted; dbias. After attention_backward's own kernel.
void attention_dkv(const Context& context, const AttentionBackward& a);
void attention_dbias(const Context& context, const AttentionBackward& a);

// Tiles' shared memory: at most 99 KB, all that a block of sm_86, sm_89 and sm_120 has.
template <class T, int kDim>
constexpr size_t shared_bytes(const Tiles& tiles) {
  return (2 * tiles.rows + 2 * tiles.stages * tiles.step) * kPitch<T, kDim> * sizeof(T);
}

// What a row of scores is to become weights, and its gradient: p = exp2(s - base) * norm; of an empty row 0.
struct Row {
  float base, delta, norm;
};

// Of what the kernel of dq leaves for the others: how far its three numbers are apart.
__device__ inline int64_t rows_of_lse(const AttentionInputs& in) {
  return in.heads * in.queries * (in.q.starts ? 1 : in.batch);
}

__device__ inline void keep_row(const AttentionBackward& a, int64_t at, const Row& row) {
  const int64_t size = rows_of_lse(a.in);
  a.rows[at] = row.base;
  a.rows[size + at] = row.delta;
  a.rows[2 * size + at] = row.norm;
}

__device__ inline Row kept_row(const AttentionBackward& a, int64_t at, bool inside) {
  const int64_t size = rows_of_lse(a.in);
  return inside ? Row{a.rows[at], a.rows[size + at], a.rows[2 * size + at]} : Row{INFINITY, 0, 0};
}

// Calls use(step, stage) for steps 0 ... steps - 1, each when what load(step, stage) has started to copy is
// there; the next one's is on its way meanwhile if there are two stages.
template <int kStages, class Load, class Use>
__device__ void walk(int steps, Load&& load, Use&& use) {
  if (kStages == 2 && steps > 0) load(0, 0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    const int stage = kStages == 2 ? step % 2 : 0;
    if (kStages == 1) load(step, 0);
    if (kStages == 2 && step + 1 < steps) load(step + 1, 1 - stage);
    commit_copies();
    wait_for_copies<kStages - 1>();
    __syncthreads();  // what all threads copied is here
    use(step, stage);
    __syncthreads();  // and no longer needed
  }
  wait_for_copies<0>();
  __syncthreads();
}

// s = q.k becomes weights; row(n, e) is what a pair's row has. bends: as to_scores gives them.
template <bool kKeysAreRows, bool kExtras, int kCols, class F>
__device__ void to_weights(const AttentionInputs& in, const Head& head, const Sequence& seq, int i0, int j0,
                           Sums<kCols>& s, Sums<kCols>* bends, F&& row) {
  if constexpr (kExtras) to_scores<kKeysAreRows, kCols>(in, head, seq, i0, j0, s, bends);
  for_numbers<kCols>([&](int n, int e, int, int) {
    const Row r = row(n, e);
    s[n][e] = kExtras ? exp2_of(s[n][e] - r.base) * r.norm : exp2_of(fmaf(s[n][e], head.factor, -r.base));
  });
  hide<kKeysAreRows, kExtras, kCols>(in, head, seq, i0, j0, 0.0f, s);
}

// p becomes ds, of p and dp, before softcap.
template <int kCols, class F>
__device__ void to_gradients(Sums<kCols>& p, const Sums<kCols>& dp, F&& row) {
  for_numbers<kCols>([&](int n, int e, int, int) { p[n][e] *= dp[n][e] - row(n, e).delta; });
}

template <int kCols>
__device__ void multiply_all(Sums<kCols>& x, const Sums<kCols>& by) {
  for_numbers<kCols>([&](int n, int e, int, int) { x[n][e] *= by[n][e]; });
}

template <class T, int kDim>
__device__ void zero_gaps(void* to, const int32_t* starts, int64_t b, int64_t batch, int64_t first,
                          int64_t count, int64_t tokens, int64_t heads, int64_t head) {
  if (!to) return;
  for_gaps(starts, b, batch, first, count, tokens, [&](int64_t row) {
    T* const at = static_cast<T*>(to) + (row * heads + head) * kDim;
    for (int col = threadIdx.x; col < kDim; col += blockDim.x) at[col] = rounded_to<T>(0.0f);
  });
}

}  // namespace fastlm
