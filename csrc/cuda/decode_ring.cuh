// A ring in shared memory that keys and values of one sequence and kv head come through, 16 of each a step,
// for the warps that work on the same keys: one to four, each with a tile of rows of its own.
//
// Read from the cache straight into the registers of mma operands, a 128-byte line is asked for in two to
// four pieces, and nothing is under way while a warp computes: 3.0 TB/s of an H200's 3.8, measured. cp.async
// asks for whole lines, and copies of later steps are under way all the time. Where in shared memory a row's
// 16-byte chunks are depends on the row, so that taking operands out meets no bank twice.
#pragma once

#include <algorithm>

#include "../contract/decode_attention.h"
#include "fragments.cuh"
#include "kv_cache.cuh"
#include "tiles.cuh"

namespace fastlm {

constexpr int kKeys = 16;  // of a step: what mma sums over

// Starts to copy a float to shared memory; 0 where `inside` is false, and then nothing is read.
__device__ inline void copy_float_async(float* to, const float* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 4 : 0)
               : "memory");
}

// Of rows of up to kDim C; kIsWide: they are copied 16 bytes at a time.
template <class C, int kDim, bool kIsWide>
struct Ring {
  static constexpr bool kScaled = std::is_same_v<C, int8_t>;
  static constexpr int kRow = kDim * sizeof(C), kChunks = kRow / 16;
  static constexpr int kTile = kKeys * kRow;
  static constexpr int kSteps = std::min(4, 512 / kRow);  // 16 KB of them, 64 KB a block of four warps

  // Warps that share a ring have one of twice the steps, not of four times: more queries lie beside it.
  __host__ __device__ static int steps_of(int warps) { return warps == 1 ? kSteps : 2 * kSteps; }
  __host__ __device__ static int bytes_of(int warps) {
    return steps_of(warps) * 2 * (kTile + (kScaled ? kKeys * static_cast<int>(sizeof(float)) : 0));
  }

  struct Found {    // of the key (lanes 0 to 15) or the value (16 to 31) at position start + lane % 16
    int64_t at;     // in its cache; some row of it where there is none
    int64_t scale;  // in its cache's scales
    int keys;       // so many there are
  };

  const DecodeAttention& a;
  int64_t batch, kv_head;
  uint32_t end;     // no key from here on is read
  int warps, warp;  // warps that share this ring, a power of two; which of them this is
  char* rows;       // [steps][keys, values][kKeys] of them, then [steps][keys, values][kKeys] scales

  __device__ int steps() const { return steps_of(warps); }
  __device__ char* tile(int slot, bool values) const { return rows + (2 * slot + values) * kTile; }
  __device__ float* scales(int slot, bool values) const {
    return reinterpret_cast<float*>(rows + steps() * 2 * kTile) + (2 * slot + values) * kKeys;
  }

  // A page that does not exist: the first one instead, as a length that is too long is the capacity.
  __device__ Found find(uint32_t start) const {
    const int lane = threadIdx.x % 32;
    const uint32_t t = start + lane % kKeys;
    Slot slot = {0, 0};
    if (t < end) slot = slot_of(a.pages, batch, t);
    if (!exists(a.pages, slot.page)) slot.page = 0;
    const CacheStrides& at = lane < kKeys ? a.k_at : a.v_at;
    return {slot.page * at.page + kv_head * at.head + slot.index * at.slot,
            kScaled ? slot.page * at.scale_page + kv_head * at.scale_head + slot.index * at.scale_slot : 0,
            static_cast<int>(min(end - min(start, end), uint32_t{kKeys}))};
  }

  // Starts to copy a step's keys or values into a slot: one group of copies, even where there are none.
  template <bool kValues>
  __device__ void copy(const Found& found, int slot) const {
    constexpr int kRows = 32 / kChunks;  // that the lanes of a warp copy at a time
    const int lane = threadIdx.x % 32, col = lane % kChunks * kWide<C>;
    const int cols = static_cast<int>(kValues ? a.value_dim : a.dim);
    const C* cache = static_cast<const C*>(kValues ? a.v : a.k);
    char* to = tile(slot, kValues);
    int64_t at[kKeys / kRows];  // shuffled first: between branches each would be waited for
#pragma unroll
    for (int i = 0; i < kKeys / kRows; ++i) {
      at[i] = __shfl_sync(0xffffffffu, found.at, (i * kRows | lane / kChunks) + kValues * kKeys);
    }
#pragma unroll
    for (int i = 0; i < kKeys / kRows; ++i) {
      const int row = i * kRows | lane / kChunks;
      char* place = to + row * kRow + place_of(row, lane % kChunks) * 16;
      if ((i & (warps - 1)) == warp) copy_chunk(place, cache + at[i], col, row < found.keys ? cols : 0);
    }
    if constexpr (kScaled) {
      const float* from = (kValues ? a.v_scales : a.k_scales) + found.scale;
      if (warp == 0 && lane / kKeys == kValues) {
        copy_float_async(scales(slot, kValues) + lane % kKeys, from, lane % kKeys < found.keys);
      }
    }
    commit_copies();
  }

  __device__ static void copy_chunk(char* to, const C* row, int col, int cols) {
    if constexpr (kIsWide) {
      copy_async(to, row + col, col < cols);
    } else {
      Words<C, kWide<C>> words;
      read(row, col, cols, words);
      memcpy(to, words.word, 16);
    }
  }

  // All groups of copies have landed but the last 2 steps() - 2, and all warps of the ring are done with what
  // they took before. Called when so many are behind the wanted one, keys and values being copied in turns.
  __device__ void wait() const {
    if (warps == 1) {
      wait_for_copies<2 * kSteps - 2>();
      __syncwarp();
    } else {
      wait_for_copies<4 * kSteps - 2>();
      __syncthreads();
    }
  }

  // Which 16 bytes of a row hold its bytes from 16 `chunk` on: eight lanes take 64 bytes of two keys or 32 of
  // four values two apart at a time, from all banks.
  __device__ static int place_of(int row, int chunk) {
    return chunk ^ (((row & 6) ^ (row & 1) << 2) & (kChunks - 1));
  }

  // Numbers col ... of a row of a tile.
  template <int kWidth>
  __device__ static void take(const char* tile, int row, int col, Words<C, kWidth>& to) {
    using Access = typename Words<C, kWidth>::Access;
    const int place = place_of(row, col / kWide<C>) * 16 + col % kWide<C> * static_cast<int>(sizeof(C));
    const Access bits = *reinterpret_cast<const Access*>(tile + row * kRow + place);
    memcpy(to.word, &bits, to.kBytes);
  }
};

}  // namespace fastlm
