// SPDX-License-Identifier: Apache-2.0
// row_topk on the device, one block per row, free of torch: nvcc compiles it, and so do the tests
// for the CPU. The row is read once, for the maximum of each group of neighbours. The k groups with
// the largest maxima, ties to the lowest index, hold the k best elements; only they are read again.
//
// Why they do: let tau be the k-th largest maximum. k groups hold an element >= tau each, so the
// k-th best element t is >= tau. An element > tau is in a group whose maximum is > tau, which is
// taken. If t == tau, elements == tau are wanted from the lowest index on; each group taken for a
// maximum == tau has one, before all of those in the groups left out, and there are as many as can
// be wanted.
#pragma once

#include "cuda/row_topk_plan.h"

namespace mik::cuda {

constexpr uint32_t LOADS = 4;  // vectors in flight per thread

// A row as vectors of 16 aligned bytes: the first and the last may hold elements that are not its.
template <class Format>
struct Row {
  using Bits = typename Format::Bits;
  const Bits* base;
  uint32_t shift, columns;

  __device__ Row(const Bits* first, uint32_t n) : columns(n) {
    shift = reinterpret_cast<uintptr_t>(first) % 16 / sizeof(Bits);
    base = first - shift;
  }
  __device__ uint32_t vectors() const {
    return (shift + columns + width<Format> - 1) / width<Format>;
  }
  // the vectors from 1 on, and vector 0 of an aligned row, that end within the row
  __device__ uint32_t full() const { return (shift + columns) / width<Format>; }
  __device__ const uint4* vector(uint32_t v) const {
    return reinterpret_cast<const uint4*>(base) + v;
  }
  __device__ Bits operator[](uint32_t index) const { return base[shift + index]; }

  // what is not the row's is -inf, which changes no maximum, and is never read
  __device__ void load(uint32_t v, uint32_t (&words)[4]) const {
    if (v < full() && (v > 0 || shift == 0)) {
      const uint4 loaded = __ldg(vector(v));
      words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
      return;
    }
    constexpr uint32_t per_word = width<Format> / 4;
#pragma unroll
    for (uint32_t j = 0; j < width<Format>; ++j) {
      const uint32_t index = v * width<Format> + j - shift;
      const uint32_t bits = index < columns ? (*this)[index] : Format::lowest;
      const uint32_t place = j % per_word * 16;
      words[j / per_word] = place == 0 ? bits : words[j / per_word] | bits << place;
    }
  }
};

// maxima[g] = the largest element of group g. No barrier follows: find_cut has one before it loads.
template <class Format>
__device__ void group_maxima(const Row<Format>& row, uint32_t spread,
                             typename Format::Bits* maxima) {
  const uint32_t vectors = row.vectors(), full = row.full(), threads = blockDim.x;
  const auto put = [&](uint32_t v, uint32_t word) {
    if (v < vectors && v % (1u << spread) == 0) maxima[v >> spread] = folded<Format>(word);
  };
  const auto within = [](const uint32_t (&w)[4]) {
    return Format::larger(Format::larger(w[0], w[1]), Format::larger(w[2], w[3]));
  };
  const auto careful = [&](uint32_t tile) {
    const uint32_t v = tile + threadIdx.x;
    uint32_t words[4];
    // a vector beyond the row is loaded as -inf throughout
    row.load(v, words);
    uint32_t word = within(words);
    for (uint32_t step = 1u << spread >> 1; step > 0; step /= 2)
      word = Format::larger(word, __shfl_xor_sync(~0u, word, step));
    put(v, word);
  };
  uint32_t tile = 0;
  if (row.shift != 0) {
    careful(0);
    tile = threads;
  }
  for (; tile + LOADS * threads <= full; tile += LOADS * threads) {
    uint4 loaded[LOADS];
    uint32_t words[LOADS];
    // read once: not to be kept in favour of the survivors
#pragma unroll
    for (uint32_t u = 0; u < LOADS; ++u)
      loaded[u] = __ldcs(row.vector(tile + u * threads + threadIdx.x));
#pragma unroll
    for (uint32_t u = 0; u < LOADS; ++u)
      words[u] = within({loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w});
    for (uint32_t step = 1u << spread >> 1; step > 0; step /= 2) {
#pragma unroll
      for (uint32_t u = 0; u < LOADS; ++u)
        words[u] = Format::larger(words[u], __shfl_xor_sync(~0u, words[u], step));
    }
#pragma unroll
    for (uint32_t u = 0; u < LOADS; ++u) put(tile + u * threads + threadIdx.x, words[u]);
  }
  for (; tile < vectors; tile += threads) careful(tile);
}

// sources of selection
template <class Format>
struct Groups {
  const typename Format::Bits* maxima;
  uint32_t count, slots;

  __device__ void load(uint32_t slot, uint32_t (&keys)[width<Format>]) const {
    const uint4 loaded = reinterpret_cast<const uint4*>(maxima)[slot];
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (uint32_t j = 0; j < width<Format>; ++j) {
      const bool is_group = slot * width<Format> + j < count;
      keys[j] = is_group ? rank_key<Format>(element<Format>(words, j)) : 0;
    }
  }
};

// the elements of the listed groups, or of the whole row
template <class Format>
struct Elements {
  const Row<Format>& row;
  const uint16_t* list;
  uint32_t spread, slots;

  __device__ uint32_t vector(uint32_t slot) const {
    if (list == nullptr) return slot;
    return (static_cast<uint32_t>(list[slot >> spread]) << spread) + slot % (1u << spread);
  }
  __device__ uint32_t index(uint32_t slot, uint32_t j) const {
    return vector(slot) * width<Format> + j - row.shift;
  }
  __device__ void load(uint32_t slot, uint32_t (&keys)[width<Format>]) const {
    const uint32_t v = vector(slot);
    uint32_t words[4];
    row.load(v, words);
#pragma unroll
    for (uint32_t j = 0; j < width<Format>; ++j) {
      const uint32_t index = v * width<Format> + j - row.shift;
      keys[j] = index < row.columns ? rank_key<Format>(element<Format>(words, j)) : 0;
    }
  }
};

// Where the winners go: [gridDim.x, k] each, with rows of one stride. `base` is added to indices,
// which are int32 unless wide.
template <class Format>
struct Selected {
  using Bits = typename Format::Bits;
  Bits* values;
  void* indices;
  int64_t stride;
  uint32_t base;
  bool wide;

  __device__ void put(uint32_t place, uint32_t index, Bits value) const {
    const int64_t at = blockIdx.x * stride + place;
    values[at] = value;
    if (wide)
      static_cast<int64_t*>(indices)[at] = int64_t{base} + index;
    else
      static_cast<uint32_t*>(indices)[at] = base + index;
  }
};

// scores [gridDim.x, columns] with dense rows; sorted winners need wide indices
template <class Format>
__global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
    row_topk_kernel(const typename Format::Bits* __restrict__ scores, int64_t stride,
                    uint32_t columns, uint32_t k, bool sorted, Plan plan, Selected<Format> out) {
  using Bits = typename Format::Bits;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Workspace& work = *reinterpret_cast<Workspace*>(shared_bytes);
  uint16_t* list = reinterpret_cast<uint16_t*>(shared_bytes + sizeof(Workspace));
  Bits* maxima = reinterpret_cast<Bits*>(shared_bytes + plan.buffer);

  const Row<Format> row(scores + blockIdx.x * stride, columns);
  Elements<Format> elements = {row, nullptr, 0, row.vectors()};
  uint32_t floor = 1;
  if (!plan.whole_row) {
    group_maxima(row, plan.spread, maxima);
    const uint32_t count = (row.vectors() + (1u << plan.spread) - 1) >> plan.spread;
    const Groups<Format> groups = {maxima, count, (count + width<Format> - 1) / width<Format>};
    const Cut cut = find_cut<Format>(groups, k, 1, work);
    take<Format>(groups, cut, work, [&](uint32_t place, uint32_t slot, uint32_t j, uint32_t) {
      list[place] = static_cast<uint16_t>(slot * width<Format> + j);
    });
    elements.list = list;
    elements.spread = plan.spread;
    elements.slots = k << plan.spread;
    const uint32_t tau = cut.prefix << cut.shift;
    floor = tau > 0 ? tau : 1;
  }

  const Cut cut = find_cut<Format>(elements, k, floor, work);
  // the maxima are no longer needed; without room there, 64 bits per index are what the output has
  uint64_t* order = plan.sort_shared
                        ? reinterpret_cast<uint64_t*>(maxima)
                        : static_cast<uint64_t*>(out.indices) + blockIdx.x * out.stride;
  take<Format>(elements, cut, work, [&](uint32_t place, uint32_t slot, uint32_t j, uint32_t key) {
    const uint32_t index = elements.index(slot, j);
    if (sorted) {
      order[place] = static_cast<uint64_t>(key) << 32 | ~index;
    } else {
      out.put(place, index, row[index]);
    }
  });
  if (!sorted) return;
  sort_descending(order, k);
  for (uint32_t place = threadIdx.x; place < k; place += blockDim.x) {
    const uint32_t index = ~static_cast<uint32_t>(order[place]);
    out.put(place, index, row[index]);
  }
}

}  // namespace mik::cuda
