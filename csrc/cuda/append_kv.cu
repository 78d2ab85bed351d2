// append_kv: token s of sequence b goes to slot lengths[b] + s of the cache, or nowhere where there is none;
// quantised: scale = max|x| / 127 of each token and head, q = rint(x / scale), half to even.
//
// A warp takes a token of one head: its key and its value together are so many accesses of 16 bytes (32 at
// 128 dims of half precision), or of one element where they are not aligned, dealt to the lanes in turn. The
// lookup is the same in all lanes. Quantising reads the row twice, the second time from the first-level
// cache, so that no lane holds rows of any length. Lengths and page numbers are looked at here, not on the
// host: one that is outside its range drops the token, and nothing is written. Bound by bytes: k and v read
// and written once. Source: Kwon et al., "PagedAttention", https://arxiv.org/abs/2309.06180.
#include "../contract/append_kv.h"
#include "kv_cache.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

// A row of k or of v on its way into its slot.
template <class T>
struct Move {
  const T* from;
  void* to;      // T, or int8_t
  float* scale;  // null unless quantised
};

template <bool kQuantised, class T>
__device__ Move<T> move_of(const AppendedRows& rows, int64_t batch, int64_t head, int64_t token, Slot slot) {
  using Cached = std::conditional_t<kQuantised, int8_t, T>;
  const CacheStrides& at = rows.at;
  Move<T> move = {static_cast<const T*>(rows.source) + batch * rows.batch_stride + head * rows.head_stride +
                  token * rows.token_stride};
  move.to = static_cast<Cached*>(rows.cache) + slot.page * at.page + head * at.head + slot.index * at.slot;
  if constexpr (kQuantised) {
    move.scale = rows.scales + slot.page * at.scale_page + head * at.scale_head + slot.index * at.scale_slot;
  }
  return move;
}

// Calls f(is_key, col) for this lane's groups of kWidth columns: the first of them are the key's.
template <int kWidth, class F>
__device__ void for_groups(const AppendKv& a, F&& f) {
  for (int64_t col = threadIdx.x % 32 * kWidth; col < a.k.dim + a.v.dim; col += 32 * kWidth) {
    if (col < a.k.dim) {
      f(true, col);
    } else {
      f(false, col - a.k.dim);
    }
  }
}

template <int kWidth, class T>
__device__ void copy(const T* from, T* to) {
  if constexpr (kWidth == 1) {
    *to = *from;
  } else {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

// The largest magnitude's bits over the warp: among bit patterns NaN is the largest of all.
__device__ uint32_t warp_top(uint32_t bits) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
  return bits;
}

template <int kWidth, class T>
__device__ void quantise(const T* from, float scale, int8_t* to) {
  const bool usable = scale > 0 && scale < INFINITY;
  float x[kWidth];
  load<kWidth>(from, x);
  int8_t q[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) q[i] = usable ? static_cast<int8_t>(__float2int_rn(x[i] / scale)) : 0;
  if constexpr (kWidth == 1) {
    *to = q[0];
  } else {
    using Bytes = std::conditional_t<kWidth == 8, uint2, uint32_t>;
    Bytes bytes;
    memcpy(&bytes, q, kWidth);
    *reinterpret_cast<Bytes*>(to) = bytes;
  }
}

template <int kWidth, class T>
__device__ void quantise_row(const AppendKv& a, const Move<T>& k, const Move<T>& v) {
  uint32_t tops[2] = {0, 0};
  for_groups<kWidth>(a, [&](bool is_key, int64_t col) {
    float values[kWidth];
    load<kWidth>((is_key ? k.from : v.from) + col, values);
    uint32_t top = 0;
#pragma unroll
    for (float value : values) top = max(top, __float_as_uint(value) & 0x7fffffffu);
    tops[0] = max(tops[0], is_key ? top : 0);
    tops[1] = max(tops[1], is_key ? 0 : top);
  });
  const float k_scale = __uint_as_float(warp_top(tops[0])) / 127.0f;
  const float v_scale = __uint_as_float(warp_top(tops[1])) / 127.0f;
  for_groups<kWidth>(a, [&](bool is_key, int64_t col) {
    quantise<kWidth>((is_key ? k.from : v.from) + col, is_key ? k_scale : v_scale,
                     static_cast<int8_t*>(is_key ? k.to : v.to) + col);
  });
  if (threadIdx.x % 32 == 0) *k.scale = k_scale, *v.scale = v_scale;
}

template <class T, int kWidth, bool kQuantised>
__global__ void __launch_bounds__(kWarpThreads) append_kv_kernel(const AppendKv a) {
  const int64_t row = place<Team::kWarp>().row;
  if (row >= a.batch * a.kv_heads * a.tokens) return;
  const int64_t token = row % a.tokens, head = row / a.tokens % a.kv_heads;
  const int64_t batch = row / a.tokens / a.kv_heads, position = a.pages.lengths[batch] + token;
  if (position < 0 || position >= capacity_of(a.pages)) return;
  const Slot slot = slot_of(a.pages, batch, static_cast<uint32_t>(position));
  if (!exists(a.pages, slot.page)) return;
  const Move<T> k = move_of<kQuantised, T>(a.k, batch, head, token, slot);
  const Move<T> v = move_of<kQuantised, T>(a.v, batch, head, token, slot);
  if constexpr (kQuantised) {
    quantise_row<kWidth>(a, k, v);
  } else {
    for_groups<kWidth>(a, [&](bool is_key, int64_t col) {
      copy<kWidth>((is_key ? k.from : v.from) + col, static_cast<T*>(is_key ? k.to : v.to) + col);
    });
  }
}

// Whether rows can be moved kWide<T> elements at a time: 16 bytes from the source, into a quantised cache a
// byte each.
template <class T>
bool wide_moves(const AppendKv& a, const AppendedRows& rows) {
  bool wide = wide_rows<T>(
      rows.dim,
      {{rows.source, rows.batch_stride}, {rows.source, rows.head_stride}, {rows.source, rows.token_stride}});
  const uintptr_t bytes = a.quantised ? kWide<T> : 16;
  wide &= reinterpret_cast<uintptr_t>(rows.cache) % bytes == 0;
  for (int64_t stride : {rows.at.page, rows.at.head, rows.at.slot}) wide &= stride % kWide<T> == 0;
  return wide;
}

}  // namespace

void append_kv(const Context& context, const AppendKv& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    with_width<T>(wide_moves<T>(a, a.k) && wide_moves<T>(a, a.v), [&]<int kWidth>() {
      with_bool(a.quantised, [&]<bool kQuantised>() {
        launch("append_kv", context, append_kv_kernel<T, kWidth, kQuantised>,
               blocks_for<Team::kWarp>(a.batch * a.kv_heads * a.tokens, kWarpThreads), kWarpThreads, 0, a);
      });
    });
  });
}

}  // namespace fastlm
