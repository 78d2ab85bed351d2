// rope: the first `rotated` elements of every row of x [batch, heads, seq, dim] turned in pairs by the angles
// of its position, the rest copied; `transposed` turns back, which is the gradient.
//
// A thread takes 16 bytes of each half of a row (interleaved: 32 bytes side by side), in up to 4 heads:
// cosines and sines of its pairs stay in registers as float32, and so weigh no more than the rows.
// Neighbouring threads take neighbouring pairs, then positions. Bound by bytes: x in, y out; 4 * rotated
// bytes of tables a position, from the second-level cache. Source: Su et al., "RoFormer",
// https://arxiv.org/abs/2104.09864.
#include "../contract/rope.h"
#include "launch.cuh"
#include "parameters.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads =
    4;  // of a thread: 64 bytes of a table's float32 for 64 bytes of rows in half precision

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kWidth pairs (p, q) from pair i on.
template <int kWidth, bool kInterleaved, class T>
__device__ void load_pairs(const T* x, int64_t i, int64_t half, float (&p)[kWidth], float (&q)[kWidth]) {
  if constexpr (!kInterleaved) {
    load<kWidth>(x + i, p);
    load<kWidth>(x + half + i, q);
  } else if constexpr (kWidth == 1) {
    p[0] = as_float(x[2 * i]), q[0] = as_float(x[2 * i + 1]);
  } else {
    float both[2 * kWidth];
    load<2 * kWidth>(x + 2 * i, both);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) p[k] = both[2 * k], q[k] = both[2 * k + 1];
  }
}

template <int kWidth, bool kInterleaved, class T>
__device__ void store_pairs(const float (&p)[kWidth], const float (&q)[kWidth], int64_t i, int64_t half,
                            T* y) {
  if constexpr (!kInterleaved) {
    store_whole<kWidth>(p, y + i);
    store_whole<kWidth>(q, y + half + i);
  } else if constexpr (kWidth == 1) {
    y[2 * i] = rounded_to<T>(p[0]), y[2 * i + 1] = rounded_to<T>(q[0]);
  } else {
    float both[2 * kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) both[2 * k] = p[k], both[2 * k + 1] = q[k];
    store_whole<2 * kWidth>(both, y + 2 * i);
  }
}

// Turns pairs i ... i + kWidth - 1 of `heads` heads; x and y: their first, at the position of the tables'
// row, which starts at `table`.
template <class W, int kWidth, bool kInterleaved, class T>
__device__ void rotate(const Rope& a, int64_t table, int64_t i, int heads, const T* x, T* y) {
  const int64_t half = a.rotated / 2;
  float cos_p[kWidth], cos_q[kWidth], to_p[kWidth], to_q[kWidth];
  load_parameter<W>(a.cos, table + i, cos_p);
  load_parameter<W>(a.cos, table + half + i, cos_q);
  load_parameter<W>(a.sin, table + (a.transposed ? half : 0) + i, to_p);
  load_parameter<W>(a.sin, table + (a.transposed ? 0 : half) + i, to_q);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    to_p[k] = a.transposed ? to_p[k] : -to_p[k];
    to_q[k] = a.transposed ? -to_q[k] : to_q[k];
  }
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (head >= heads) return;
    float p[kWidth], q[kWidth];
    load_pairs<kWidth, kInterleaved>(x + head * a.x_stride[1], i, half, p, q);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float turned = p[k] * cos_p[k] + q[k] * to_p[k];
      q[k] = q[k] * cos_q[k] + p[k] * to_q[k];
      p[k] = turned;
    }
    store_pairs<kWidth, kInterleaved>(p, q, i, half, y + head * a.y_stride[1]);
  }
}

// `turned` groups of kWidth pairs and `copied` ones of kWidth elements behind them make a row.
template <class T, class W, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const Rope a, int64_t turned, int64_t copied, int64_t head_groups) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = index % (turned + copied);
  index /= turned + copied;
  const int64_t position = index % a.seq;
  index /= a.seq;
  const int64_t head = index % head_groups * kHeads, sequence = index / head_groups;
  if (sequence >= a.batch) return;
  const int heads = static_cast<int>(min(static_cast<int64_t>(kHeads), a.heads - head));
  const T* x =
      static_cast<const T*>(a.x) + sequence * a.x_stride[0] + head * a.x_stride[1] + position * a.x_stride[2];
  T* y = static_cast<T*>(a.y) + sequence * a.y_stride[0] + head * a.y_stride[1] + position * a.y_stride[2];
  if (group < turned) {
    const int64_t table = sequence * a.table_batch_stride + position * a.rotated;
    return rotate<W, kWidth, kInterleaved>(a, table, group * kWidth, heads, x, y);
  }
  const int64_t col = a.rotated + (group - turned) * kWidth;
  for (int h = 0; h < heads; ++h) {
    float values[kWidth];
    load<kWidth>(x + h * a.x_stride[1] + col, values);
    store_whole<kWidth>(values, y + h * a.y_stride[1] + col);
  }
}

template <class T>
bool is_wide(const Rope& a) {
  bool wide = a.rotated % (2 * kWide<T>) == 0 && a.dim % kWide<T> == 0;
  for (int d = 0; d < 3; ++d) wide &= a.x_stride[d] % kWide<T> == 0 && a.y_stride[d] % kWide<T> == 0;
  return wide && aligned(a.x) && aligned(a.y) && aligned(a.cos.data) && aligned(a.sin.data);
}

}  // namespace

void rope(const Context& context, const Rope& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    with_parameters<T>(a.cos.narrow, is_wide<T>(a), [&]<class W, int kWidth>() {
      with_bool(a.interleaved, [&]<bool kInterleaved>() {
        const int64_t turned = a.rotated / 2 / kWidth, copied = (a.dim - a.rotated) / kWidth;
        const int64_t head_groups = divided_up(a.heads, kHeads);
        const int64_t threads = a.batch * head_groups * a.seq * (turned + copied);
        launch("rope", context, rope_kernel<T, W, kWidth, kInterleaved>, divided_up(threads, kThreads),
               kThreads, 0, a, turned, copied, head_groups);
      });
    });
  });
}

}  // namespace fastlm
