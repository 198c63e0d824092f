// SPDX-License-Identifier: Apache-2.0
// mass_threshold on the device, free of torch: nvcc compiles it, and so do the tests for the CPU.
// The threshold's bits are found from the top, some of them per read of x: each read adds up the
// mass of the entries by their next bits, and the kernel behind it picks the bits at which the mass
// from above reaches the fraction. fp32 has 3 + 10 + 10 bits behind its exponent, hence 3 reads;
// 16-bit formats take 2.
//
// Entries with one exponent are integers times one power of two. Sums of those, by atomics in any
// order, are exact; so are the sums over exponents (exact_sum.h), which are rounded once, to be
// compared with the fraction of the total. Nothing depends on the grid.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/exact_sum.h"
#include "cuda/formats.h"
#include "cuda/select.h"

namespace mik::cuda {

constexpr uint32_t MASS_THREADS = 256;
constexpr uint32_t MASS_LOADS = 4;  // vectors in flight per thread
constexpr uint32_t MASS_BINS = 2048;
// entries that the operator does not take: the sum of this bin is their number
constexpr uint32_t OUTSIDE = MASS_BINS;

// How the bits of a magnitude are divided: level 0 takes the exponent and what else 2048 bins tell
// apart, every level behind it at most 10 bits.
template <class Format>
struct MassDigits {
  static constexpr uint32_t mantissa = std::countr_zero(Format::infinity);
  static constexpr uint32_t exponents = Format::infinity >> mantissa;  // of finite numbers
  static constexpr uint32_t first = 11 - std::countr_zero(exponents + 1);
  static constexpr uint32_t levels = mantissa - first > 10 ? 3 : 2;
};

// bits of a magnitude below those of this level and the ones before it
template <class Format, uint32_t LEVEL>
constexpr uint32_t mass_shift =
    LEVEL == 0 ? MassDigits<Format>::mantissa - MassDigits<Format>::first
    : LEVEL + 1 == MassDigits<Format>::levels ? 0
                                              : 10;

// What is known of the threshold behind a level, the same in every block.
struct MassFound {
  ExactSum above;   // mass of the larger exponents, in units of the least number
  double wanted;    // mass to reach, in the same units
  uint64_t before;  // what of this exponent lies above the prefix, in units of 2^place
  uint32_t place;
  uint32_t prefix;   // the leading bits of the threshold, all of them if settled
  uint32_t settled;  // there is no mass, or an entry outside
};

struct MassWork {
  uint32_t low[MASS_BINS + 1], high[MASS_BINS + 1];  // halves of the sums of this block
  uint64_t totals[MASS_THREADS / 32];
  uint64_t exponents[256];
  MassFound found;
};

// global memory, zero at first
struct MassScratch {
  uint64_t sums[3][MASS_BINS + 1];
  MassFound found[3];
};

template <class Format>
__device__ uint32_t significand(uint32_t magnitude) {
  constexpr uint32_t one = 1u << MassDigits<Format>::mantissa;
  return (magnitude & (one - 1)) | (magnitude < one ? 0 : one);
}

// Adds an entry to its bin. 64-bit atomics on shared memory are loops of compare and swap (sm_80 to
// sm_100), so a carry goes by hand: one in 256 entries at most.
template <class Format, uint32_t LEVEL>
__device__ void add_mass(uint32_t bits, bool absolute, uint32_t prefix, MassWork& work) {
  constexpr uint32_t sign = 1u << (8 * sizeof(typename Format::Bits) - 1);
  const uint32_t magnitude = bits & (sign - 1);
  if (magnitude == 0) return;
  uint32_t bin = magnitude >> mass_shift<Format, LEVEL>, mass = significand<Format>(magnitude);
  if constexpr (LEVEL == 0) {
    if (magnitude >= Format::infinity || (bits & sign && !absolute)) bin = OUTSIDE, mass = 1;
  } else {
    constexpr uint32_t digit = mass_shift<Format, LEVEL - 1> - mass_shift<Format, LEVEL>;
    if (bin >> digit != prefix) return;
    bin &= (1u << digit) - 1;
  }
  const uint32_t before = atomicAdd(&work.low[bin], mass);
  if (before + mass < before) atomicAdd(&work.high[bin], 1u);
}

// The vectors of 16 aligned bytes that hold x; what is not x is 0, which has no mass.
template <class Format>
struct Entries {
  using Bits = typename Format::Bits;
  const Bits* base;
  int64_t begin, end;  // counted from base

  __device__ Entries(const Bits* x, int64_t n) {
    begin = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(Bits);
    base = x - begin;
    end = begin + n;
  }
  __device__ uint4 operator[](int64_t vector) const {
    const int64_t first = vector * width<Format>;
    if (begin <= first && first + width<Format> <= end)
      return __ldg(reinterpret_cast<const uint4*>(base) + vector);
    uint32_t words[4] = {};
    constexpr uint32_t per_word = width<Format> / 4;
#pragma unroll
    for (uint32_t j = 0; j < width<Format>; ++j) {
      const int64_t at = first + j;
      const uint32_t bits = begin <= at && at < end ? base[at] : 0;
      words[j / per_word] |= bits << j % per_word * 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

template <class Format, uint32_t LEVEL>
__device__ void add_masses(const typename Format::Bits* x, int64_t n, bool absolute, uint64_t* sums,
                           MassWork& work) {
  for (uint32_t b = threadIdx.x; b <= MASS_BINS; b += MASS_THREADS) work.low[b] = work.high[b] = 0;
  __syncthreads();
  const uint32_t prefix = LEVEL == 0 ? 0 : work.found.prefix;
  const Entries<Format> entries(x, n);
  constexpr int64_t tile = MASS_THREADS * MASS_LOADS;
  const int64_t vectors = (entries.end + width<Format> - 1) / width<Format>;
  for (int64_t v = blockIdx.x * tile + threadIdx.x; v < vectors; v += gridDim.x * tile) {
    uint4 loaded[MASS_LOADS];
#pragma unroll
    for (uint32_t u = 0; u < MASS_LOADS; ++u) loaded[u] = entries[v + u * MASS_THREADS];
#pragma unroll
    for (uint32_t u = 0; u < MASS_LOADS; ++u) {
      const uint32_t words[4] = {loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w};
#pragma unroll
      for (uint32_t j = 0; j < width<Format>; ++j)
        add_mass<Format, LEVEL>(element<Format>(words, j), absolute, prefix, work);
    }
  }
  __syncthreads();
  for (uint32_t b = threadIdx.x; b <= MASS_BINS; b += MASS_THREADS) {
    const unsigned long long sum =
        static_cast<unsigned long long>(work.high[b]) << 32 | work.low[b];
    if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(sums) + b, sum);
  }
}

// The exponent at which the mass from above reaches the fraction, from the sums of level 0; by the
// first warp, between barriers. A lane has `per` exponents, the largest first.
template <class Format>
__device__ void find_exponent(const uint64_t* sums, double fraction, MassWork& work) {
  using Digits = MassDigits<Format>;
  constexpr uint32_t per = (Digits::exponents + 31) / 32;
  MassFound& found = work.found;
  const auto exponent = [](uint32_t lane, uint32_t j) {
    return static_cast<int32_t>(Digits::exponents - 1 - lane * per - j);
  };
  const auto place = [](int32_t e) { return static_cast<uint32_t>(e > 0 ? e - 1 : 0); };
  ExactSum sum = {};
  for (uint32_t j = 0; j < per; ++j) {
    const int32_t e = exponent(threadIdx.x, j);
    if (e >= 0) sum.add(work.exponents[e], place(e));
  }
#pragma unroll
  for (uint32_t l = 0; l < LIMBS; ++l) sum.limbs[l] = inclusive_sum(sum.limbs[l]);
  const double mass = sum.rounded(), all = __shfl_sync(~0u, mass, 31);
  const double larger = __shfl_up_sync(~0u, mass, 1), above = threadIdx.x == 0 ? 0 : larger;
  const double wanted = fraction * all;
  if (sums[OUTSIDE] != 0 || all == 0) {
    if (threadIdx.x != 0) return;
    found.settled = 1;
    // a quiet NaN
    found.prefix = sums[OUTSIDE] != 0 ? Format::infinity | Format::infinity >> 1 : 0;
    return;
  }
  // the one lane that reaches it with its exponents: what lies above does not, or is nothing at all
  if (mass == 0 || mass < wanted || (above != 0 && above >= wanted)) return;
  for (uint32_t j = per; j-- > 0;) {
    const int32_t e = exponent(threadIdx.x, j);
    if (e < 0 || work.exponents[e] == 0) continue;
    sum.subtract(work.exponents[e], place(e));
    const double left = sum.rounded();
    if (left != 0 && left >= wanted) continue;
    found = {sum, wanted, 0, place(e), static_cast<uint32_t>(e), 0};
    return;
  }
}

// The next BITS bits of the threshold, from the sums of its prefix by those bits.
template <uint32_t BITS>
__device__ void find_mass_digit(const uint64_t* sums, MassWork& work) {
  constexpr uint32_t count = 1u << BITS, per = (count + MASS_THREADS - 1) / MASS_THREADS;
  MassFound& found = work.found;
  const uint32_t prefix = found.prefix;
  const bool has = threadIdx.x * per < count;
  const uint32_t top = has ? count - 1 - threadIdx.x * per : 0;
  uint64_t own = 0;
  for (uint32_t j = 0; j < per && has; ++j) own += sums[top - j];
  const uint64_t upto = inclusive_sum(own);
  if (threadIdx.x % 32 == 31) work.totals[threadIdx.x / 32] = upto;
  uint64_t mass = found.before + upto - own;
  // behind it nobody reads what is written below
  __syncthreads();
  if (own == 0) return;
  for (uint32_t w = 0; w < threadIdx.x / 32; ++w) mass += work.totals[w];
  const auto reaches = [&](uint64_t units) {
    ExactSum sum = found.above;
    sum.add(units, found.place);
    const double rounded = sum.rounded();
    return rounded != 0 && rounded >= found.wanted;
  };
  if (reaches(mass) || !reaches(mass + own)) return;
  for (uint32_t j = 0;; ++j) {
    const uint64_t sum = sums[top - j];
    if (sum != 0 && reaches(mass + sum)) {
      found.prefix = prefix << BITS | (top - j);
      found.before = mass;
      return;
    }
    mass += sum;
  }
}

// Kernel LEVEL picks the bits of the level before it and adds up by those of its own; behind the
// last level, one block writes the threshold.
template <class Format, uint32_t LEVEL>
__global__ void __launch_bounds__(MASS_THREADS, 4)
    mass_threshold_kernel(const typename Format::Bits* __restrict__ x, int64_t n, double fraction,
                          bool absolute, MassScratch* scratch, typename Format::Bits* out) {
  using Digits = MassDigits<Format>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  MassWork& work = *reinterpret_cast<MassWork*>(shared_bytes);
  if constexpr (LEVEL == 1) {
    const uint64_t* sums = scratch->sums[0];
    for (uint32_t e = threadIdx.x; e < Digits::exponents; e += MASS_THREADS) {
      uint64_t sum = 0;
      for (uint32_t j = 0; j < 1u << Digits::first; ++j) sum += sums[(e << Digits::first) + j];
      work.exponents[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) find_exponent<Format>(sums, fraction, work);
    __syncthreads();
    if (!work.found.settled)
      find_mass_digit<Digits::first>(sums + (work.found.prefix << Digits::first), work);
  } else if constexpr (LEVEL > 1) {
    if (threadIdx.x == 0) work.found = scratch->found[LEVEL - 1];
    __syncthreads();
    constexpr uint32_t bits = mass_shift<Format, LEVEL - 2> - mass_shift<Format, LEVEL - 1>;
    if (!work.found.settled) find_mass_digit<bits>(scratch->sums[LEVEL - 1], work);
  }
  __syncthreads();
  if constexpr (LEVEL == Digits::levels) {
    if (threadIdx.x == 0) *out = static_cast<typename Format::Bits>(work.found.prefix);
  } else {
    if constexpr (LEVEL > 0) {
      if (threadIdx.x == 0 && blockIdx.x == 0) scratch->found[LEVEL] = work.found;
      if (work.found.settled) return;
    }
    add_masses<Format, LEVEL>(x, n, absolute, scratch->sums[LEVEL], work);
  }
}

// blocks that have a tile of vectors each, at most `most`
template <class Format>
uint32_t mass_blocks(int64_t n, int64_t most) {
  const int64_t tile = MASS_THREADS * MASS_LOADS * width<Format>;
  return static_cast<uint32_t>(std::min(most, (n + width<Format> - 2) / tile + 1));
}

// launch(kernel, blocks) for every kernel of a call, in order
template <class Format, class Launch>
void mass_threshold_kernels(uint32_t blocks, const Launch& launch) {
  launch(mass_threshold_kernel<Format, 0>, blocks);
  launch(mass_threshold_kernel<Format, 1>, blocks);
  if constexpr (MassDigits<Format>::levels == 3) launch(mass_threshold_kernel<Format, 2>, blocks);
  launch(mass_threshold_kernel<Format, MassDigits<Format>::levels>, 1);
}

}  // namespace mik::cuda
