// decode_attention: how its work is cut into parts, and the kernel that merges them; decode_attention.cuh has
// the rest.
#include "decode_attention.cuh"

namespace fastlm {
namespace {

constexpr int64_t kBlocks = 264;  // at most, where keys are cut: two for each multiprocessor of an H100
constexpr int64_t kMostParts = 128;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

Cut cut_of(const DecodeAttention& a) {
  Cut cut;
  cut.rows = a.heads / a.kv_heads * a.queries;
  cut.tiles = cut.rows <= kRows ? 1 : cut.rows <= 2 * kRows ? 2 : kWarps;
  cut.row_blocks = static_cast<int>(divide_up(cut.rows, cut.tiles * kRows));
  const int64_t groups = a.batch * a.kv_heads * cut.row_blocks;
  // Rounded down: all blocks run at once, and where there are enough without parts nothing is merged.
  cut.shares = static_cast<int>(std::clamp<int64_t>(kBlocks / std::max<int64_t>(groups, 1), 1, kMostParts));
  int64_t reach = a.pages.capacity();
  if (a.left >= 0 && a.left < reach - a.queries) reach = a.left + a.queries;
  cut.parts = static_cast<int>(std::clamp<int64_t>(divide_up(reach, kLeastShare), 1, cut.shares));
  return cut;
}

// A row a block, a column a thread: parts in their order.
template <class Q>
__global__ void decode_merge_kernel(const Decode d) {
  const DecodeAttention& a = d.a;
  const int64_t index = blockIdx.x, query = index % a.queries, head = index / a.queries % a.heads;
  const int64_t batch = index / a.queries / a.heads;
  const int used = static_cast<int>(reach_of(a, batch, d.cut.shares).used());
  const float* outs = a.scratch + index * d.cut.parts * a.value_dim;
  const float* lses = a.scratch + (gridDim.x * a.value_dim + index) * d.cut.parts;
  float top = -INFINITY, sum = 0, out = 0;
  for (int part = 0; part < used; ++part) top = fmaxf(top, lses[part]);
  const float shift = shift_of(top);
  const int col = threadIdx.x;
#pragma unroll 4
  for (int part = 0; part < used; ++part) {
    const float weight = exponential(lses[part] - shift);
    sum += weight;
    if (col < a.value_dim) out += weight * outs[part * a.value_dim + col];
  }
  const int64_t at = (batch * a.queries + query) * a.heads + head;
  if (col < a.value_dim) {
    static_cast<Q*>(a.out)[at * a.value_dim + col] = rounded_to<Q>(sum == 0 ? 0 : out / sum);
  }
  if (col == 0) a.lse[index] = sum == 0 ? -INFINITY : top + logf(sum);
}

}  // namespace

int64_t decode_scratch(const DecodeAttention& a) {
  const Cut cut = cut_of(a);
  return cut.parts == 1 ? 0 : a.batch * a.heads * a.queries * cut.parts * (a.value_dim + 1);
}

void decode_attention(const Context& context, const DecodeAttention& a) {
  if (a.batch * a.heads * a.queries == 0) return;
  const Decode d = {a, cut_of(a)};
  with_device_dtype(a.dtype, [&]<class Q>() {
    a.quantised ? decode_quantised_parts(context, d) : decode_parts<Q, Q>(context, d);
    if (d.cut.parts == 1) return;
    launch("decode_attention", context, decode_merge_kernel<Q>, a.batch * a.heads * a.queries,
           static_cast<int>(divide_up(a.value_dim, 32) * 32), 0, d);
  });
}

}  // namespace fastlm
