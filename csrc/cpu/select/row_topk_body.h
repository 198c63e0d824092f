// SPDX-License-Identifier: Apache-2.0
// Bound and filter of one row; compiled once per level.

#include "cpu/simd/vectors_body.h"

// lane maxima: bound[l] = max of row[l], row[l + lanes], ... ignoring NaN. Every lane holds a
// different element, so the k-th largest maximum is at most the k-th largest element
template <class A>
static void lane_maxima(const A* row, int64_t n, A* maxima, int64_t lanes) {
  for (int64_t l = 0; l < lanes; ++l) maxima[l] = -__builtin_huge_val();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) maxima[l] = row[i + l] > maxima[l] ? row[i + l] : maxima[l];
  for (int64_t l = 0; i < n; ++i, ++l) maxima[l] = row[i] > maxima[l] ? row[i] : maxima[l];
}

// indices of the elements that are not below the bound, NaN included; `out` has room for n
template <class A>
static int64_t filter_row(const A* row, int64_t n, A bound, int32_t* out) {
  int64_t found = 0, i = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    const float_vector limit = set(bound);
    for (; i + 32 <= n; i += 32) {
      uint32_t mask = 0;
      for (int v = 0; v < 32 / kLanes; ++v)
        mask |= not_below(load(row + i + v * kLanes), limit) << (v * kLanes % 32);
      for (; mask != 0; mask &= mask - 1)
        out[found++] = static_cast<int32_t>(i + __builtin_ctz(mask));
    }
  }
  for (; i < n; ++i)
    if (!(row[i] < bound)) out[found++] = static_cast<int32_t>(i);
  return found;
}

template <class T, class A>
static void widen(const T* from, A* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
}

// the first 32 KB of a row towards L2
template <class T>
static void prefetch_start(const T* row, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < bytes && at < (32 << 10); at += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at, 0, 2);
}
