// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows; part of a body, so no include guard.

// out[0:d] += sum of 1..4 rows, in order; four at a time so that `out` is read and written once per
// four rows and four streams are in flight
template <class T, class A>
static inline void add_rows(A* out, int64_t d, const T* const* rows, const A* weights, int count) {
  if (count == 4) {
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const A c0 = weights[0], c1 = weights[1], c2 = weights[2], c3 = weights[3];
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      A sum = out[i] + c0 * static_cast<A>(r0[i]);
      sum += c1 * static_cast<A>(r1[i]);
      sum += c2 * static_cast<A>(r2[i]);
      out[i] = sum + c3 * static_cast<A>(r3[i]);
    }
    return;
  }
  for (int j = 0; j < count; ++j) {
    const T* row = rows[j];
    const A c = weights[j];
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] += c * static_cast<A>(row[i]);
  }
}

template <class T>
static inline void prefetch_row(const T* row, int64_t d) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(at + byte);
}
