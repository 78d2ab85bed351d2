// cross_entropy: (1 - e) * (lse - x_t) + e * (lse - mean(x)) + z * lse^2 for each row of logits x.
//
// Forward: a warp takes a row of up to 512 columns, a block a longer one, above 8192 columns going along it,
// and reads it once: each thread keeps the maximum and the sum of exps of what it has seen (Milakov,
// Gimelshein, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867), which are
// joined at the row's end. One block then adds up the rows. Backward: a warp takes a piece of 1024
// columns, one pass. Both at once, for linear_cross_entropy: a block writes a row's gradient as soon as it
// has its loss, from registers, or from the second-level cache. Of ignored rows nothing is read. Bound by
// bytes: logits in; logits in, dlogits out.
#include <type_traits>

#include "../contract/cross_entropy.h"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;         // elements a thread: two loads of 16 bytes of half precision
constexpr int kMostThreads = 512;  // with 128 registers each

// What row_losses_kernel writes: losses of rows, and what backward needs.
struct RowLosses {
  float *row_loss, *maximum, *exp_sum;  // [rows]
  void* loss = nullptr;                 // of the logits' type [rows], or null
};

// What it takes and writes beside them for linear_cross_entropy; bias and dlogits are of one type.
struct WithGradients {
  const void* bias = nullptr;    // [cols], added to the logits, or null
  const float* dloss = nullptr;  // [rows], or null: no dlogits
  void* dlogits = nullptr;       // may be the logits
  int64_t stride = 0;            // of dlogits
};

// An ignored row's target, and one that is no class, is never used as an index.
__device__ bool is_used(const CrossEntropyInput& in, int64_t target) {
  return target != in.ignore_index && target >= 0 && target < in.cols;
}

// Of a row: dlogits = exp(x - maximum) * scale - even, less `taken` at the target.
struct RowGradient {
  int64_t target;
  float maximum, scale, even, taken;

  __device__ RowGradient(const CrossEntropyInput& in, int64_t target, float maximum, float exp_sum, float d)
      : target(target), maximum(maximum) {
    const float cols = static_cast<float>(in.cols);
    const float factor = in.z_loss > 0 ? 1.0f + 2.0f * in.z_loss * (maximum + logf(exp_sum)) : 1.0f;
    scale = d * factor / exp_sum;
    even = d * (in.label_smoothing / cols);
    taken = d * (1.0f - in.label_smoothing + in.label_smoothing / cols);
  }
  // x: in columns `col` and on; becomes their gradient.
  template <int kWidth>
  __device__ void replace(int64_t col, float (&x)[kWidth]) const {
#pragma unroll
    for (float& v : x) v = exp_of(v - maximum);
    const uint64_t at = target - col;
    if (at < kWidth) {  // of one access of a row: comparing each column would double what a column costs
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[k] = x[k] * scale - (k == at ? taken : even);
    } else {
#pragma unroll
      for (float& v : x) v = v * scale - even;
    }
  }
};

// What a thread has seen of a row: its maximum; sums of exp(x - maximum) and, for smoothing, of x - shift.
struct RowSums {
  float maximum = -INFINITY, exps = 0, shifted = 0;
};

template <int kWidth>
__device__ void add_items(const Place& at, int64_t start, int64_t cols, bool smoothing, float shift,
                          const float (&x)[kItems], RowSums& row) {
  float higher = row.maximum, sum = 0, shifted = 0;
#pragma unroll
  for (float v : x) higher = fmaxf(higher, v);
  const float around = shift_of(higher);
#pragma unroll
  for (float v : x) sum += exp_of(v - around);
  row.exps = row.exps * exp_of(row.maximum - around) + sum;
  row.maximum = higher;
  if (!smoothing) return;
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) shifted += x[i + k] - shift;
  });
  row.shifted += shifted;  // a sum of short sums keeps the rounding error small
}

// The loss of a row that counts, of its maximum and of its sums.
__device__ float loss_of(const CrossEntropyInput& in, float picked, float shift, float maximum, float exps,
                         float shifted) {
  const float log_sum = logf(exps), lse = log_sum + maximum;
  float loss = (1.0f - in.label_smoothing) * (log_sum - (picked - maximum));  // the difference is exact
  if (in.label_smoothing > 0) {
    loss += in.label_smoothing * (log_sum + (maximum - shift) - shifted / static_cast<float>(in.cols));
  }
  if (in.z_loss > 0) loss += in.z_loss * lse * lse;
  return loss;
}

// Adds the bias of a thread's elements, if there is one.
template <class D, int kWidth>
__device__ void add_bias(const WithGradients& with, const Place& at, int64_t start, int64_t cols,
                         float (&x)[kItems]) {
  if (!with.bias) return;
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t col) {
    float of_items[kWidth];
    load(static_cast<const D*>(with.bias) + col, of_items);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[i + k] += of_items[k];
  });
}

// Writes a row's gradient; x are its elements where a thread still holds all that it takes.
template <class T, class D, int kWidth, Team kTeam>
__device__ void store_gradient(const CrossEntropyInput& in, const WithGradients& with, const RowGradient& g,
                               bool used, const Place& at, float (&x)[kItems]) {
  const T* logits = row_at<T>(in.logits, in.logits_stride, at.row);
  D* to = row_at<D>(with.dlogits, with.stride, at.row);
  for (int64_t start = 0; start < in.cols; start += at.threads * kItems) {
    if (kTeam == Team::kLoop && used) {
      load_items<kWidth>(logits, at, start, in.cols, x);
      add_bias<D, kWidth>(with, at, start, in.cols, x);
    }
    for_items<kWidth, kItems>(at, start, in.cols, [&](int i, int64_t col) {
      float values[kWidth] = {};
      if (used) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] = x[i + k];
        g.replace(col, values);
      }
      store<kWidth>(values, to + col);
    });
    if (kTeam != Team::kLoop) break;
  }
}

// T: of the logits. D: of bias and dlogits, or void: neither is there.
template <class T, class D, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads)
    row_losses_kernel(const CrossEntropyInput in, const RowLosses out, const WithGradients with) {
  constexpr bool kAtOnce = !std::is_void_v<D>;
  const Place at = place<kTeam>();
  if (at.row >= in.rows) return;
  const int64_t target = in.target[at.row];
  const bool used = is_used(in, target);
  const T* logits = row_at<T>(in.logits, in.logits_stride, at.row);
  float picked = used ? as_float(logits[target]) : 0;
  if constexpr (kAtOnce) {
    if (used && with.bias) picked += as_float(static_cast<const D*>(with.bias)[target]);
  }
  // mean(x) is taken around x_t, so that it is as exact as the differences; if that is -inf the loss is inf
  const float shift = fabsf(picked) < INFINITY ? picked : 0;
  float x[kItems];
  RowSums row;
  for (int64_t start = 0; used && start < in.cols; start += at.threads * kItems) {
    load_items<kWidth>(logits, at, start, in.cols, x, -INFINITY);
    if constexpr (kAtOnce) add_bias<D, kWidth>(with, at, start, in.cols, x);
    add_items<kWidth>(at, start, in.cols, in.label_smoothing > 0, shift, x, row);
    if (kTeam != Team::kLoop) break;
  }
  if constexpr (kAtOnce && kTeam == Team::kWarp) __syncwarp();  // x_t is read before its gradient is written
  const float maximum = used ? team_max<kTeam>(row.maximum) : 0;
  float sums[2] = {row.exps * exp_of(row.maximum - shift_of(maximum)), row.shifted};
  if (used) team_all<kTeam>(sums, Add{});
  const float exp_sum = used ? sums[0] : 1;
  if (at.thread == 0) {
    const float loss = used                        ? loss_of(in, picked, shift, maximum, exp_sum, sums[1])
                       : target == in.ignore_index ? 0
                                                   : NAN;
    out.row_loss[at.row] = loss, out.maximum[at.row] = maximum, out.exp_sum[at.row] = exp_sum;
    if (out.loss) static_cast<T*>(out.loss)[at.row] = rounded_to<T>(loss);
  }
  if constexpr (kAtOnce) {
    if (!with.dloss) return;
    const RowGradient g(in, target, maximum, exp_sum, with.dloss[at.row]);
    store_gradient<T, D, kWidth, kTeam>(in, with, g, used, at, x);
  }
}

constexpr int kTotalThreads = 1024;  // one block: 4 loads of each thread hide the memory's latency

// count; and loss, unless that is null: the sum of row_loss, or its mean over count rows.
template <class T>
__global__ void __launch_bounds__(kTotalThreads)
    add_rows_kernel(const CrossEntropyInput in, const float* row_loss, T* loss, int64_t* count) {
  float sums[1] = {};
  int64_t counts[1] = {};
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < in.rows; row += kTotalThreads) {
    counts[0] += in.target[row] != in.ignore_index;
    sums[0] += row_loss[row];
  }
  team_all<Team::kBlock>(counts, Add{});
  team_all<Team::kBlock>(sums, Add{});
  if (threadIdx.x > 0) return;
  *count = counts[0];
  const int64_t over = in.reduction == Reduction::kMean && counts[0] > 0 ? counts[0] : 1;
  if (loss) *loss = rounded_to<T>(sums[0] / static_cast<float>(over));
}

constexpr int kGradientItems =
    32;  // a thread of backward: what it does for its row costs as much as 12 of them
constexpr int64_t kGradientPiece = 32 * kGradientItems;

template <class T, int kWidth>
__global__ void __launch_bounds__(kWarpThreads)
    cross_entropy_backward_kernel(const CrossEntropyBackward a, int64_t pieces) {
  const CrossEntropyInput& in = a.in;
  const PiecePlace at = piece_place(pieces, kGradientPiece);
  if (at.row >= in.rows) return;
  const int64_t target = in.target[at.row];
  const bool used = is_used(in, target);
  const T* logits = row_at<T>(in.logits, in.logits_stride, at.row);
  Packed<kWidth, T> x[kGradientItems / kWidth];
  load_items<kWidth, kGradientItems>(logits, at, at.start, used ? in.cols : 0, x);
  float d = as_float(static_cast<const T*>(a.dloss)[in.reduction == Reduction::kNone ? at.row : 0]);
  if (in.reduction == Reduction::kMean) d /= static_cast<float>(*a.count > 0 ? *a.count : 1);
  const RowGradient g(in, target, a.maximum[at.row], a.exp_sum[at.row], d);
  T* dlogits = row_at<T>(a.dlogits, in.cols, at.row);
  for_items<kWidth, kGradientItems>(at, at.start, in.cols, [&](int i, int64_t col) {
    float values[kWidth] = {};
    if (used) {
      unpack(x[i / kWidth], values);
      g.replace(col, values);
    }
    store<kWidth>(values, dlogits + col);
  });
}

// Narrow: the type of which an access has most elements.
template <class T, class D, class Narrow>
void row_losses(const Context& context, const CrossEntropyInput& in, const RowLosses& out,
                const WithGradients& with) {
  const bool wide =
      wide_rows<Narrow>(in.cols, {{in.logits, in.logits_stride}, {with.bias}, {with.dlogits, with.stride}});
  with_width<Narrow>(wide, [&]<int kWidth>() {
    with_team<kItems, kMostThreads>(in.cols, [&]<Team kTeam>(int threads) {
      launch("cross_entropy", context, row_losses_kernel<T, D, kWidth, kTeam>,
             blocks_for<kTeam>(in.rows, threads), threads, 0, in, out, with);
    });
  });
}

}  // namespace

void cross_entropy_forward(const Context& context, const CrossEntropyForward& a) {
  const bool each = a.in.reduction == Reduction::kNone;
  with_device_dtype(a.in.dtype, [&]<class T>() {
    row_losses<T, void, T>(context, a.in, {a.row_loss, a.maximum, a.exp_sum, each ? a.loss : nullptr}, {});
    launch("cross_entropy", context, add_rows_kernel<T>, 1, kTotalThreads, 0, a.in, a.row_loss,
           each ? nullptr : static_cast<T*>(a.loss), a.count);
  });
}

void cross_entropy_backward(const Context& context, const CrossEntropyBackward& a) {
  with_device_dtype(a.in.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.in.cols, {{a.in.logits, a.in.logits_stride}, {a.dlogits}});
    with_width<T>(wide, [&]<int kWidth>() {
      launch("cross_entropy_backward", context, cross_entropy_backward_kernel<T, kWidth>,
             piece_blocks(a.in.rows, a.in.cols, kGradientPiece), kWarpThreads, 0, a,
             pieces_of(a.in.cols, kGradientPiece));
    });
  });
}

void cross_entropy_at_once(const Context& context, const CrossEntropyAtOnce& a) {
  with_device_dtype(a.dtype, [&]<class D>() {
    row_losses<float, D, D>(context, a.in, {a.row_loss, a.maximum, a.exp_sum},
                            {a.bias, a.dloss, a.dlogits, a.dlogits_stride});
  });
}

}  // namespace fastlm
