// SPDX-License-Identifier: Apache-2.0
// Dots and sums over the slots of a token or a feature; compiled once per level.

#include "cpu/simd/dot_body.h"
#include "cpu/simd/rows_body.h"

// out[s] = <rows[n], w[indices[s]]> for the slots s of token n, of the rows at the feature's level
template <class T, class A, class Owned, class Level>
static void dot_tokens(int64_t begin, int64_t end, Owned owned, Level level, int64_t d,
                       const T* rows, int64_t ldr, const T* w, int64_t ldw, const int64_t* indices,
                       T* out) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t s = owned.begin(n), last = owned.end(n); s < last; ++s)
      out[s] = static_cast<T>(
          dot<T, T, A>(rows + level(indices[s]) + n * ldr, w + indices[s] * ldw, d));
}

// dw[f] = sum over the slots of f of coefficient * rows[token], db[f] = sum of the coefficients;
// `sum` is [d] scratch, `pointers` and `weights` hold the slots of the hottest feature
template <class T, class A, class Token>
static void sum_features(int64_t begin, int64_t end, Token token, int64_t d, const T* coefficients,
                         const T* rows, int64_t ldr, const int64_t* offsets, const int64_t* order,
                         T* dw, T* db, A* sum, const T** pointers, A* weights) {
  for (int64_t f = begin; f < end; ++f) {
    A bias = A(0);
    int64_t active = 0;
    for (int64_t s = offsets[f]; s < offsets[f + 1]; ++s) {
      const A c = static_cast<A>(coefficients[order[s]]);
      weights[active] = c;
      pointers[active] = rows + token(order[s]) * ldr;
      active += c != A(0);
      bias += c;
    }
    for (int64_t i = 0; i < d; ++i) sum[i] = A(0);
    add_rows(sum, d, pointers, weights, active);
    for (int64_t i = 0; i < d; ++i) dw[f * d + i] = static_cast<T>(sum[i]);
    db[f] = static_cast<T>(bias);
  }
}

// a += alpha x and b += beta y, with the rows that come next prefetched line by line alongside
template <class T>
static inline void add_pair(float* a, float alpha, const T* x, const T* next_x, float* b,
                            float beta, const T* y, const T* next_y, int64_t d) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + line <= d; i += line) {
    __builtin_prefetch(next_x + i);
    __builtin_prefetch(next_y + i);
#pragma omp simd
    for (int64_t l = i; l < i + line; ++l) {
      a[l] += alpha * static_cast<float>(x[l]);
      b[l] += beta * static_cast<float>(y[l]);
    }
  }
  for (; i < d; ++i) {
    a[i] += alpha * static_cast<float>(x[i]);
    b[i] += beta * static_cast<float>(y[i]);
  }
}

// a += alpha x, with the row that comes next prefetched line by line alongside
template <class T>
static inline void add_one(float* a, float alpha, const T* x, const T* next, int64_t d) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + line <= d; i += line) {
    __builtin_prefetch(next + i);
#pragma omp simd
    for (int64_t l = i; l < i + line; ++l) a[l] += alpha * static_cast<float>(x[l]);
  }
  for (; i < d; ++i) a[i] += alpha * static_cast<float>(x[i]);
}

// one pass over features begin..end: w_dec[f] stays in L1 for all its tokens, and each token's dy
// row serves the dot and the sum while it is there. Given is whether d_pre stands in for the dot
template <bool Given, class T, class W, class Token>
static void sae_features(int64_t begin, int64_t end, Token token, const SaeGradients<T, W>& g) {
  const int64_t d_out = g.d_out, d_in = g.d_in, both = d_out < d_in ? d_out : d_in;
  const int64_t *offsets = g.offsets, *order = g.order;
  for (int64_t f = begin; f < end; ++f) {
    float* to_dec = g.dw_dec + f * d_out;
    float* to_enc = g.dw_enc + f * d_in;
    if (!g.accumulate) {
      for (int64_t i = 0; i < d_out; ++i) to_dec[i] = 0;
      for (int64_t i = 0; i < d_in; ++i) to_enc[i] = 0;
    }
    float bias = 0;
    const W* row = g.w_dec + f * g.w_row;
    const T* dy = g.levels == nullptr ? g.dy : g.dy + g.levels[f] * g.dy_level;
    for (int64_t s = offsets[f]; s < offsets[f + 1]; ++s) {
      const int64_t slot = order[s], n = token(slot);
      const float value = static_cast<float>(g.values[slot]);
      float dvalue = Given ? static_cast<float>(g.d_pre[slot]) : 0;
      if (value == 0 && (!Given || dvalue == 0)) continue;
      const T *gradient = dy + n * g.dy_row, *input = g.x + n * g.x_row;
      // the next slot's token, also across features, whose level may be another: a row of dy too
      // early or too late costs no more than none
      const int64_t next = s + 1 < offsets[end] ? token(order[s + 1]) : n;
      const T *next_gradient = dy + next * g.dy_row, *next_input = g.x + next * g.x_row;
      if (!Given) dvalue = dot<T, W, float>(gradient, row, d_out);
      bias += dvalue;
      // a given gradient and a value need not be 0 together
      if (Given && value == 0) {
        add_one(to_enc, dvalue, input, next_input, d_in);
      } else if (Given && dvalue == 0) {
        add_one(to_dec, value, gradient, next_gradient, d_out);
      } else {
        add_pair(to_dec, value, gradient, next_gradient, to_enc, dvalue, input, next_input, both);
        if (both < d_out)
          add_one(to_dec + both, value, gradient + both, next_gradient + both, d_out - both);
        if (both < d_in)
          add_one(to_enc + both, dvalue, input + both, next_input + both, d_in - both);
      }
    }
    g.db_enc[f] = g.accumulate ? g.db_enc[f] + bias : bias;
  }
}
