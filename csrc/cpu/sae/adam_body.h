// SPDX-License-Identifier: Apache-2.0
// Adam over rows with the decoder constraint; compiled once per level.

#include "cpu/dot_body.h"

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

// rest1 = 1 - beta1 and rest2 = 1 - beta2 come rounded from fp64: in fp32 1 - 0.999 is off
// by 1.3e-5
template <class P, class G, class A>
static void adam_range(int64_t begin, int64_t end, int64_t d, P* param, const G* grad, A* exp_avg,
                       A* exp_avg_sq, A rest1, A beta2, A rest2, A step_size, A inverse_correction,
                       A eps, A clip, bool project, bool unit_norm, A* next) {
  for (int64_t r = begin; r < end; ++r) {
    P* p = param + r * d;
    const G* g = grad + r * d;
    A *m = exp_avg + r * d, *v = exp_avg_sq + r * d;
    const A along = project ? static_cast<A>(dot<G, P, double>(g, p, d)) : A(0);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const A before = static_cast<A>(p[i]);
      const A gradient = clip * (static_cast<A>(g[i]) - along * before);
      m[i] += rest1 * (gradient - m[i]);
      v[i] = beta2 * v[i] + rest2 * gradient * gradient;
      // 1 / sqrt(1 - beta2^t) is taken out of the root
      const A after = before - step_size * m[i] / (root(v[i]) * inverse_correction + eps);
      next[i] = after;
    }
    A shrink = A(1);
    if (unit_norm) {
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
