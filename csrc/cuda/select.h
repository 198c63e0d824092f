// SPDX-License-Identifier: Apache-2.0
// Exact selection by one block from anything that yields keys: where the k-th largest lies, and an
// ordered compaction of what is taken. A source has `slots`; load(slot, keys) gives `width` keys,
// in index order over the slots, 0 for a place that holds nothing; index(slot, j) names one.
#pragma once

#include "cuda/formats.h"

namespace mik::cuda {

// Taken are the keys >= floor with key >> shift > prefix, and the first `need` with == prefix.
struct Cut {
  uint32_t prefix, shift, need, floor;
};

// shared memory of the functions below
struct Workspace {
  uint32_t bins[256];
  uint32_t totals[2][32];  // of each warp, for two tiles
  uint32_t digit, need, count;
};

template <class T>
__device__ T inclusive_sum(T value) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// by the first warp: the bin that holds the need-th largest
__device__ inline void find_digit(Workspace& work, uint32_t need) {
  const uint32_t top = 255 - 8 * threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t j = 0; j < 8; ++j) sum += work.bins[top - j];
  const uint32_t upto = inclusive_sum(sum);
  uint32_t before = upto - sum;
  if (before >= need || upto < need) return;
  uint32_t digit = top;
  while (before + work.bins[digit] < need) before += work.bins[digit--];
  work.digit = digit;
  work.need = need - before;
  work.count = work.bins[digit];
}

// The k largest keys >= floor, of which there are at least k, by radix from the top, 8 bits per
// pass. No pass is made whose outcome is known: often all keys of the last digit are needed. The
// source is loaded from behind a barrier.
template <class Format, class Source>
__device__ Cut find_cut(const Source& source, uint32_t k, uint32_t floor, Workspace& work) {
  constexpr uint32_t bits = 8 * sizeof(typename Format::Bits);
  Cut cut = {0, bits, k, floor};
  do {
    for (uint32_t b = threadIdx.x; b < 256; b += blockDim.x) work.bins[b] = 0;
    __syncthreads();
    for (uint32_t slot = threadIdx.x; slot < source.slots; slot += blockDim.x) {
      uint32_t keys[width<Format>];
      source.load(slot, keys);
#pragma unroll
      for (uint32_t j = 0; j < width<Format>; ++j) {
        const bool same = cut.shift == bits || keys[j] >> cut.shift == cut.prefix;
        if (same && keys[j] >= floor) atomicAdd(&work.bins[keys[j] >> (cut.shift - 8) & 255], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(work, cut.need);
    __syncthreads();
    cut.prefix = cut.prefix << 8 | work.digit;
    cut.shift -= 8;
    cut.need = work.need;
  } while (cut.shift > 0 && cut.need != work.count);
  return cut;
}

// put(place, slot, j, key) for everything taken, places 0, 1, ... in index order
template <class Format, class Source, class Put>
__device__ void take(const Source& source, const Cut& cut, Workspace& work, const Put& put) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t above = 0, level = 0;  // counted in the tiles before this one
  uint32_t parity = 0;
  for (uint32_t tile = 0; tile < source.slots; tile += blockDim.x, parity ^= 1) {
    const uint32_t slot = tile + threadIdx.x;
    uint32_t keys[width<Format>] = {};
    if (slot < source.slots) source.load(slot, keys);
    // both counts in one word: a tile has at most 256 * 8 keys
    uint32_t mine = 0;
#pragma unroll
    for (uint32_t j = 0; j < width<Format>; ++j) {
      const uint32_t rank = keys[j] >> cut.shift;
      if (keys[j] >= cut.floor)
        mine += (rank > cut.prefix ? 1u << 16 : 0) + (rank == cut.prefix ? 1 : 0);
    }
    const uint32_t upto = inclusive_sum(mine);
    if (lane == 31) work.totals[parity][warp] = upto;
    __syncthreads();
    uint32_t before = upto - mine, all = 0;
    for (uint32_t w = 0; w < warps; ++w) {
      const uint32_t total = work.totals[parity][w];
      if (w < warp) before += total;
      all += total;
    }
    uint32_t a = above + (before >> 16), l = level + (before & 0xffff);
    if (mine != 0) {
#pragma unroll
      for (uint32_t j = 0; j < width<Format>; ++j) {
        const uint32_t rank = keys[j] >> cut.shift;
        if (keys[j] < cut.floor || rank < cut.prefix) continue;
        if (rank > cut.prefix || l < cut.need) put(a + min(l, cut.need), slot, j, keys[j]);
        rank > cut.prefix ? ++a : ++l;
      }
    }
    above += all >> 16;
    level += all & 0xffff;
  }
  __syncthreads();
}

// In place, by bitonic merging. Every comparison puts the larger one first, so the places from n to
// the next power of two would never move and need not exist.
__device__ inline void sort_descending(uint64_t* data, uint32_t n) {
  for (uint64_t size = 2; size / 2 < n; size *= 2) {
    for (uint32_t half = static_cast<uint32_t>(size / 2); half > 0; half /= 2) {
      for (uint32_t pair = threadIdx.x;; pair += blockDim.x) {
        const uint64_t low = pair / half * (2ull * half) + pair % half;
        if (low >= n) break;
        // the first step of a merge mirrors: two descending runs become one bitonic run
        const uint64_t high = 2 * half == size ? low + size - 1 - 2 * (pair % half) : low + half;
        if (high < n && data[low] < data[high]) {
          const uint64_t swapped = data[low];
          data[low] = data[high];
          data[high] = swapped;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace mik::cuda
