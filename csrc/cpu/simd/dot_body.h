// SPDX-License-Identifier: Apache-2.0
// <a, b> in the accumulator type; part of a body, so no include guard.

// four running sums hide the latency of the multiply-add (4 cycles, two per cycle)
template <class T, class U, class A>
static inline A dot(const T* a, const U* b, int64_t d) {
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), step = 4 * lanes;
  A sums[step];
  for (int64_t j = 0; j < step; ++j) sums[j] = A(0);
  int64_t i = 0;
  for (; i + step <= d; i += step)
#pragma omp simd
    for (int64_t j = 0; j < step; ++j)
      sums[j] += static_cast<A>(a[i + j]) * static_cast<A>(b[i + j]);
  for (int64_t j = 0; i < d; ++i, ++j) sums[j] += static_cast<A>(a[i]) * static_cast<A>(b[i]);
  A total = A(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < step; ++j) total += sums[j];
  return total;
}
