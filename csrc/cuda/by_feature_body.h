// SPDX-License-Identifier: Apache-2.0
// by_feature on the device, free of torch: nvcc compiles it, and so do the tests for the CPU. A
// stable radix sort of slots by feature, from the lowest digit, and the offsets of the features.
//
// The slots are cut into at most MAX_CHUNKS chunks of whole tiles, one chunk a block. A pass is two
// kernels: `count` writes how many keys of each digit every chunk has; `place` adds those up, in
// every block for itself, and moves the slots of its chunk tile by tile. No block waits for
// another, and nothing depends on an order of atomics.
//
// Offsets come with the last pass. Its input is sorted by the lower digits, so a tile, sorted by
// the last one, is sorted by feature, and the features whose lower digits begin in the tile have
// their offsets there: what came before the tile, and a binary search within it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/select.h"

namespace mik::cuda {

constexpr uint32_t SORT_THREADS = 512;
constexpr uint32_t SORT_ITEMS = 8;  // of a thread, at most
constexpr uint32_t SORT_TILE = SORT_THREADS * SORT_ITEMS;
constexpr uint32_t SORT_WARPS = SORT_THREADS / 32;
// two passes for up to 2^18 features; a digit is a thread's
constexpr uint32_t MAX_DIGIT_BITS = 9, MAX_DIGITS = 1 << MAX_DIGIT_BITS;
static_assert(MAX_DIGITS == SORT_THREADS);
// every block reads all counts, 2 kB a chunk: 32 MB of the L2 at 128
constexpr uint32_t MAX_CHUNKS = 128;
// below it tiles are smaller, for more blocks to share the work
constexpr uint32_t FEW_CHUNKS = 64;

struct SortPlan {
  uint32_t passes, digit_bits;  // the last digit may have fewer
  uint32_t bits;                // of a feature
  uint32_t items;               // of a thread
  uint32_t chunks;
  uint32_t tiles;  // of a chunk, the last one's may be fewer
};

inline SortPlan make_sort_plan(uint64_t slots, uint64_t features, uint64_t most_chunks = MAX_CHUNKS,
                               uint64_t few_chunks = FEW_CHUNKS) {
  SortPlan plan = {};
  while (features > uint64_t{1} << plan.bits) ++plan.bits;
  plan.passes = plan.bits == 0 ? 1 : (plan.bits + MAX_DIGIT_BITS - 1) / MAX_DIGIT_BITS;
  plan.digit_bits = (plan.bits + plan.passes - 1) / plan.passes;
  const uint64_t least = (slots + SORT_THREADS * few_chunks - 1) / (SORT_THREADS * few_chunks);
  plan.items = least < SORT_ITEMS ? static_cast<uint32_t>(least) : SORT_ITEMS;
  const uint64_t tile = SORT_THREADS * plan.items, tiles = (slots + tile - 1) / tile;
  plan.tiles = static_cast<uint32_t>((tiles + most_chunks - 1) / most_chunks);
  plan.chunks = static_cast<uint32_t>((tiles + plan.tiles - 1) / plan.tiles);
  return plan;
}

// One pass. `features` [slots] is read by the first, `keys` and `from` by the others; the last
// writes `order` [slots] and `offsets` [n_features + 1], the others `to_keys` and `to`.
struct SortPass {
  const int64_t* features;
  const uint32_t *keys, *from;
  uint32_t *to_keys, *to;
  int64_t *order, *offsets;
  uint32_t* counts;  // [chunks, digits]
  uint32_t slots, n_features;
  uint32_t mask;           // of a key's bits: whatever a feature is, it leads nowhere else
  uint32_t shift, digits;  // a power of two, at least 4
  uint32_t items;          // of a thread
  uint32_t tiles;          // of a chunk
};

struct SortWork {
  union {
    uint16_t ranks[SORT_WARPS][MAX_DIGITS];  // keys of each digit in a warp, then in those before
    struct {
      uint32_t keys[SORT_TILE], slots[SORT_TILE];
    } sorted;
  };
  uint32_t base[MAX_DIGITS];   // where the next key of a digit goes
  uint32_t start[MAX_DIGITS];  // where a digit begins in the sorted tile
  uint32_t totals[SORT_WARPS];
};

template <bool FIRST>
__device__ uint32_t sort_key(const SortPass& pass, uint32_t slot) {
  if constexpr (FIRST) return static_cast<uint32_t>(__ldg(pass.features + slot)) & pass.mask;
  return __ldg(pass.keys + slot);
}

__device__ inline uint32_t digit_of(const SortPass& pass, uint32_t key) {
  return key >> pass.shift & (pass.digits - 1);
}

// f(first slot, slots) for each tile of this block's chunk
template <class F>
__device__ void for_each_tile(const SortPass& pass, const F& f) {
  const uint64_t tile = SORT_THREADS * pass.items, begin = blockIdx.x * pass.tiles * tile;
  for (uint32_t t = 0; t < pass.tiles; ++t) {
    const uint64_t first = begin + t * tile;
    if (first >= pass.slots) return;
    const uint64_t left = pass.slots - first;
    f(static_cast<uint32_t>(first), static_cast<uint32_t>(left < tile ? left : tile));
  }
}

template <bool FIRST>
__global__ void __launch_bounds__(SORT_THREADS, 2) by_feature_count_kernel(SortPass pass) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared_bytes);
  counts[threadIdx.x] = 0;
  __syncthreads();
  for_each_tile(pass, [&](uint32_t first, uint32_t slots) {
    uint32_t keys[SORT_ITEMS];
#pragma unroll
    for (uint32_t i = 0; i < SORT_ITEMS; ++i) {
      const uint32_t at = i * SORT_THREADS + threadIdx.x;
      keys[i] = at < slots ? sort_key<FIRST>(pass, first + at) : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < SORT_ITEMS; ++i)
      if (i * SORT_THREADS + threadIdx.x < slots) atomicAdd(&counts[digit_of(pass, keys[i])], 1u);
  });
  __syncthreads();
  if (threadIdx.x < pass.digits)
    pass.counts[blockIdx.x * pass.digits + threadIdx.x] = counts[threadIdx.x];
}

// The sum of what the threads before this one give, from behind a barrier.
__device__ inline uint32_t sum_before(uint32_t value, uint32_t* totals) {
  const uint32_t upto = inclusive_sum(value), warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 31) totals[warp] = upto;
  __syncthreads();
  uint32_t before = upto - value;
  for (uint32_t w = 0; w < warp; ++w) before += totals[w];
  return before;
}

// base[digit] = the keys of smaller digits and, of this one, those in the chunks before
__device__ inline void find_bases(const SortPass& pass, SortWork& work) {
  const uint32_t t = threadIdx.x;
  work.base[t] = work.start[t] = 0;
  __syncthreads();
  // four digits of some of the chunks
  const uint32_t quads = pass.digits / 4, quad = t % quads;
  uint4 all = {}, before = {};
#pragma unroll 8
  for (uint32_t c = t / quads; c < gridDim.x; c += SORT_THREADS / quads) {
    const uint4 n = __ldg(reinterpret_cast<const uint4*>(pass.counts) + c * quads + quad);
    const uint32_t is_before = c < blockIdx.x;
    all.x += n.x, all.y += n.y, all.z += n.z, all.w += n.w;
    before.x += n.x * is_before, before.y += n.y * is_before;
    before.z += n.z * is_before, before.w += n.w * is_before;
  }
  const auto add = [quad](uint32_t* to, const uint4& n) {
    atomicAdd(to + 4 * quad, n.x), atomicAdd(to + 4 * quad + 1, n.y);
    atomicAdd(to + 4 * quad + 2, n.z), atomicAdd(to + 4 * quad + 3, n.w);
  };
  add(work.start, all);
  add(work.base, before);
  __syncthreads();
  work.base[t] += sum_before(work.start[t], work.totals);
}

// Sorts a tile by the pass's digit, stably, into work.sorted. Returns how many keys have the digit
// of this thread's number. A warp takes neighbours, 32 at a time.
template <bool FIRST>
__device__ uint32_t sort_tile(const SortPass& pass, uint32_t first, uint32_t slots,
                              SortWork& work) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto place_of = [&](uint32_t i) { return (warp * pass.items + i) * 32 + lane; };
  const auto is_real = [&](uint32_t i) { return i < pass.items && place_of(i) < slots; };
  uint16_t* ranks = work.ranks[warp];
  for (uint32_t d = lane; d < MAX_DIGITS; d += 32) ranks[d] = 0;
  // the lanes meet again below, but a match orders no memory
  __syncwarp();
  uint32_t keys[SORT_ITEMS], from[SORT_ITEMS], places[SORT_ITEMS] = {};
#pragma unroll
  for (uint32_t i = 0; i < SORT_ITEMS; ++i) {
    const uint32_t slot = first + place_of(i);
    keys[i] = is_real(i) ? sort_key<FIRST>(pass, slot) : 0;
    from[i] = FIRST ? slot : is_real(i) ? __ldg(pass.from + slot) : 0;
  }
#pragma unroll
  for (uint32_t i = 0; i < SORT_ITEMS; ++i) {
    if (i >= pass.items) break;
    const bool real = is_real(i);
    const uint32_t digit = digit_of(pass, keys[i]);
    const uint32_t peers = __match_any_sync(~0u, real ? digit : MAX_DIGITS);
    const uint32_t before = ranks[digit];
    __syncwarp();
    places[i] = before + __popc(peers & ((1u << lane) - 1));
    if (real && (peers >> lane) == 1) ranks[digit] = static_cast<uint16_t>(places[i] + 1);
    __syncwarp();
  }
  __syncthreads();
  uint32_t count = 0;
  for (uint32_t w = 0; w < SORT_WARPS; ++w) {
    const uint32_t own = work.ranks[w][threadIdx.x];
    work.ranks[w][threadIdx.x] = static_cast<uint16_t>(count);
    count += own;
  }
  work.start[threadIdx.x] = sum_before(count, work.totals);
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < SORT_ITEMS; ++i) {
    const uint32_t digit = digit_of(pass, keys[i]);
    places[i] += work.start[digit] + ranks[digit];
  }
  // the sorted tile lies where the ranks are
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < SORT_ITEMS; ++i) {
    if (!is_real(i)) continue;
    work.sorted.keys[places[i]] = keys[i];
    work.sorted.slots[places[i]] = from[i];
  }
  __syncthreads();
  return count;
}

// The offsets of the features whose lower digits begin in this sorted tile.
template <bool FIRST>
__device__ void write_offsets(const SortPass& pass, uint32_t first, uint32_t slots,
                              const SortWork& work) {
  const uint32_t low_mask = (1u << pass.shift) - 1;
  const bool ends = first + slots == pass.slots;
  // of lower digits: those in [begin, end)
  const uint32_t begin = first == 0 ? 0 : (sort_key<FIRST>(pass, first - 1) & low_mask) + 1;
  const uint32_t last = sort_key<FIRST>(pass, first + slots - 1) & low_mask;
  const uint32_t end = ends ? low_mask + 1 : last + 1;
  const uint32_t lows = end - begin;
  // digits that a feature below n_features has
  const uint32_t digits = ((pass.n_features - 1) >> pass.shift) + 1;
  for (uint32_t e = threadIdx.x; e < digits * lows; e += SORT_THREADS) {
    const uint32_t digit = e / lows;
    const uint32_t feature = digit << pass.shift | (begin + e % lows);
    if (feature >= pass.n_features) continue;
    uint32_t low = work.start[digit];
    uint32_t high = digit + 1 < MAX_DIGITS ? work.start[digit + 1] : slots;
    const uint32_t from = low;
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (work.sorted.keys[middle] < feature)
        low = middle + 1;
      else
        high = middle;
    }
    pass.offsets[feature] = work.base[digit] + (low - from);
  }
  if (ends && threadIdx.x == 0) pass.offsets[pass.n_features] = pass.slots;
}

template <bool FIRST, bool LAST>
__global__ void __launch_bounds__(SORT_THREADS, 2) by_feature_place_kernel(SortPass pass) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  SortWork& work = *reinterpret_cast<SortWork*>(shared_bytes);
  find_bases(pass, work);
  for_each_tile(pass, [&](uint32_t first, uint32_t slots) {
    const uint32_t count = sort_tile<FIRST>(pass, first, slots, work);
    for (uint32_t at = threadIdx.x; at < slots; at += SORT_THREADS) {
      const uint32_t key = work.sorted.keys[at], digit = digit_of(pass, key);
      const uint32_t to = work.base[digit] + (at - work.start[digit]);
      if constexpr (LAST) {
        pass.order[to] = work.sorted.slots[at];
      } else {
        pass.to_keys[to] = key;
        pass.to[to] = work.sorted.slots[at];
      }
    }
    if constexpr (LAST) write_offsets<FIRST>(pass, first, slots, work);
    // of the next tile; the sorted one is overwritten
    __syncthreads();
    work.base[threadIdx.x] += count;
  });
}

// launch(kernel, shared bytes, pass) for every kernel of a call, in order. Keys and slots between
// passes lie in `between`, 2 x slots for two passes, 4 x slots for more.
template <class Launch>
void by_feature_kernels(const SortPlan& plan, SortPass pass, uint32_t* between,
                        const Launch& launch) {
  const auto half = [&](uint32_t p) { return between + (p % 2 * 2 * uint64_t{pass.slots}); };
  pass.mask = static_cast<uint32_t>((uint64_t{1} << plan.bits) - 1);
  pass.items = plan.items;
  pass.tiles = plan.tiles;
  for (uint32_t p = 0; p < plan.passes; ++p) {
    const bool first = p == 0, last = p + 1 == plan.passes;
    pass.shift = p * plan.digit_bits;
    const uint32_t left = plan.bits - pass.shift;
    pass.digits = 1u << std::max(2u, std::min(plan.digit_bits, left));
    if (!first) pass.keys = half(p - 1), pass.from = half(p - 1) + pass.slots;
    if (!last) pass.to_keys = half(p), pass.to = half(p) + pass.slots;
    const uint32_t counting = sizeof(uint32_t) * MAX_DIGITS;
    launch(first ? by_feature_count_kernel<true> : by_feature_count_kernel<false>, counting, pass);
    launch(first ? last ? by_feature_place_kernel<true, true> : by_feature_place_kernel<true, false>
           : last ? by_feature_place_kernel<false, true>
                  : by_feature_place_kernel<false, false>,
           static_cast<uint32_t>(sizeof(SortWork)), pass);
  }
}

}  // namespace mik::cuda
