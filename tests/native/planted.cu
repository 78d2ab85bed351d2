// Kernels with a fault each, and their twins without it, for tests/test_cuda_planted.py.
#include "cuda/tiles.cuh"

namespace {

using namespace fastlm;

// y[i] = x[blockDim.x - 1 - i] of one block.
template <bool kBarrier>
__device__ void reverse(const float* x, float* y) {
  __shared__ float elements[1024];
  elements[threadIdx.x] = x[threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  y[threadIdx.x] = elements[blockDim.x - 1 - threadIdx.x];
}

// y = 2 x: n elements, a thread each.
template <bool kInside>
__device__ void twice(const float* x, int n, float* y) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (kInside ? i < n : i <= n) y[i] = 2 * x[i];
}

// The same, four elements an access, from element `first` on.
__device__ void twice_by_four(const float* x, int n, float* y, int first) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4 + first;
  if (i + 4 > n) return;
  const float4 v = *reinterpret_cast<const float4*>(x + i);
  *reinterpret_cast<float4*>(y + i) = {2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w};
}

// y[row * cols + col] = x[row * stride + col] of the row that blockIdx.x is.
template <class Index>
__device__ void copy_of_row(const uint8_t* x, int64_t stride, int cols, uint8_t* y) {
  const Index at =
      static_cast<Index>(blockIdx.x) * static_cast<Index>(stride) + static_cast<Index>(threadIdx.x);
  if (threadIdx.x < cols) y[blockIdx.x * cols + threadIdx.x] = x[static_cast<int64_t>(at)];
}

// y[i] = the sum of x[128 * step + 4 i ... + 3] over steps: the next step's copy is under way during this
// one's sum. kPending: groups of copies that may be so.
template <int kPending>
__device__ void summed(const float* x, int steps, float* y) {
  alignas(16) __shared__ float tiles[2][128];
  const int i = threadIdx.x * 4;  // a warp: each thread reads what it has copied itself
  copy_async(&tiles[0][i], x + i, true);
  commit_copies();
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    copy_async(&tiles[(step + 1) % 2][i], x + (step + 1) * 128 + i, step + 1 < steps);
    commit_copies();
    wait_for_copies<kPending>();
    const float4 v = float4_at(&tiles[step % 2][i]);
    sum += v.x + v.y + v.z + v.w;
  }
  wait_for_copies<0>();  // nobody leaves before the last, of zeros
  y[threadIdx.x] = sum;
}

enum class Layout { kRight, kExchanged, kNotTransposed };

// c [16, 8] = a [16, 16] b [16, 8] in one mma of a warp, all by rows.
template <Layout kLayout>
__device__ void multiplied(const __half* a, const __half* b, float* c) {
  alignas(16) __shared__ __half of_a[16 * 16], of_b[16 * 8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) of_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) of_b[i] = b[i];
  __syncwarp();
  uint32_t as[4], bs[4];
  load_matrices<false>(as, of_a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<kLayout != Layout::kNotTransposed>(bs, of_b + lane % 16 * 8);
  if constexpr (kLayout == Layout::kExchanged) {
    const uint32_t second = as[1];
    as[1] = as[2], as[2] = second;
  }
  float sums[4] = {};
  multiply<__half>(sums, as, bs[0], bs[1]);
  for (int e = 0; e < 4; ++e) c[(lane_row() + 8 * (e / 2)) * 8 + lane_col() + e % 2] = sums[e];
}

}  // namespace

#define PLANTED(name, call, ...) \
  extern "C" __global__ void name(__VA_ARGS__) { call; }

PLANTED(reversed, reverse<true>(x, y), const float* x, float* y)
PLANTED(reversed_without_barrier, reverse<false>(x, y), const float* x, float* y)
PLANTED(doubled, twice<true>(x, n, y), const float* x, int n, float* y)
PLANTED(doubled_one_more, twice<false>(x, n, y), const float* x, int n, float* y)
PLANTED(doubled_by_four, twice_by_four(x, n, y, 0), const float* x, int n, float* y)
PLANTED(doubled_by_four_from_one, twice_by_four(x, n, y, 1), const float* x, int n, float* y)
PLANTED(rows, copy_of_row<int64_t>(x, s, n, y), const uint8_t* x, int64_t s, int n, uint8_t* y)
PLANTED(rows_in_32_bits, copy_of_row<int>(x, s, n, y), const uint8_t* x, int64_t s, int n, uint8_t* y)
PLANTED(rows_modulo, copy_of_row<unsigned>(x, s, n, y), const uint8_t* x, int64_t s, int n, uint8_t* y)
PLANTED(sums, summed<1>(x, n, y), const float* x, int n, float* y)
PLANTED(sums_too_early, summed<2>(x, n, y), const float* x, int n, float* y)
PLANTED(product, multiplied<Layout::kRight>(a, b, c), const __half* a, const __half* b, float* c)
PLANTED(product_exchanged, multiplied<Layout::kExchanged>(a, b, c), const __half* a, const __half* b,
        float* c)
PLANTED(product_as_is, multiplied<Layout::kNotTransposed>(a, b, c), const __half* a, const __half* b,
        float* c)
