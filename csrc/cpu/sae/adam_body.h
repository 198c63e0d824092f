// SPDX-License-Identifier: Apache-2.0
// Adam over rows with the decoder constraint; compiled once per level.

#include "cpu/simd/dot_body.h"

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

// rows begin..end; `next` is [d] scratch. `of` is a copy, so that no store can change it
template <class P, class G, class A>
static void adam_range(int64_t begin, int64_t end, AdamRows<P, G, A> of, A* next) {
  const int64_t d = of.d;
  for (int64_t r = begin; r < end; ++r) {
    P* p = of.param + r * d;
    const G* g = of.grad + r * d;
    A *m = of.exp_avg + r * d, *v = of.exp_avg_sq + r * d;
    const A along = of.project ? static_cast<A>(dot<G, P, double>(g, p, d)) : A(0);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const A before = static_cast<A>(p[i]);
      const A gradient = of.clip * (static_cast<A>(g[i]) - along * before);
      m[i] += of.rest1 * (gradient - m[i]);
      v[i] = of.beta2 * v[i] + of.rest2 * gradient * gradient;
      // 1 / sqrt(1 - beta2^t) is taken out of the root
      const A after = before - of.step_size * m[i] / (root(v[i]) * of.inverse_correction + of.eps);
      next[i] = after;
    }
    A shrink = A(1);
    if (of.unit_norm) {
      // fp64 sums of a row cost nothing here: the sweep waits for memory
      const double squares = dot<A, A, double>(next, next, d);
      if (squares > 0) shrink = static_cast<A>(1 / root(squares));
    }
    for (int64_t i = 0; i < d; ++i) p[i] = static_cast<P>(next[i] * shrink);
  }
}

// sum over rows of |g - <g, p> p|^2, from the difference itself: expanding it cancels when g is
// almost parallel to p
template <class P, class G, class A>
static double sumsq_range(int64_t begin, int64_t end, int64_t d, const P* param, const G* grad,
                          bool project) {
  double total = 0;
  for (int64_t r = begin; r < end; ++r) {
    const G* g = grad + r * d;
    if (!project) {
      total += dot<G, G, double>(g, g, d);
      continue;
    }
    const P* p = param + r * d;
    const A along = static_cast<A>(dot<G, P, double>(g, p, d));
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) {
      const A rest = static_cast<A>(g[i]) - along * static_cast<A>(p[i]);
      sum += static_cast<double>(rest) * rest;
    }
    total += sum;
  }
  return total;
}
