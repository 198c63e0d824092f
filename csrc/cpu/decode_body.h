// SPDX-License-Identifier: Apache-2.0
// Weighted sums of gathered rows; compiled once per level.

#include "cpu/rows_body.h"

// y[n] = bias + sum_j values[n, j] w[indices[n, j]] for tokens begin..end; `sum` is [d] scratch
template <class T, class A>
static void decode_tokens(int64_t begin, int64_t end, int64_t k, int64_t d, const T* values,
                          const int64_t* indices, const T* w, int64_t ldw, const T* bias, T* y,
                          A* sum) {
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t i = 0; i < d; ++i) sum[i] = A(0);
    const T* rows[4];
    A weights[4];
    int pending = 0;
    for (int64_t j = 0; j < k; ++j) {
      const A value = static_cast<A>(values[n * k + j]);
      if (value == A(0)) continue;
      rows[pending] = w + indices[n * k + j] * ldw;
      weights[pending] = value;
      // rows come from L3 or memory: ask for the next one while the arithmetic of four is pending
      prefetch_row(rows[pending], d);
      if (++pending == 4) {
        add_rows(sum, d, rows, weights, 4);
        pending = 0;
      }
    }
    add_rows(sum, d, rows, weights, pending);
    T* out = y + n * d;
    if (bias != nullptr) {
      for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sum[i] + static_cast<A>(bias[i]));
    } else {
      for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sum[i]);
    }
  }
}
