// SPDX-License-Identifier: Apache-2.0
// exp and tanh of the vectors of wide_body.h, without libm; part of a body, so no include guard.
//
// exp(x) = 2^n (1 + q) with q = exp(r) - 1 and |r| <= ln 2 / 2, a Taylor series whose first term
// left out is 1.5e-8 of r in fp32 (r^8) and 1.2e-17 in fp64 (r^14): below a quarter of a rounding.
// q is accurate relative to itself, so exp(x) - 1 is too, and tanh, which is made of it.

template <class A>
struct exponential;

template <>
struct exponential<float> {
  typedef int32_t ints __attribute__((vector_size(MIK_VECTOR_BYTES)));
  // below `least` the result would be subnormal: 0
  static constexpr float least = -87.f;
  // 1.5 2^23: what is added to it is rounded to an integer in its low bits
  static constexpr float round = 12582912.f, per_ln2 = 0x1.715476p+0f;
  // ln 2 in two pieces, the first of so few bits that its multiples are exact
  static constexpr float ln2 = 0x1.63p-1f, ln2_rest = -0x1.bd0106p-13f;
  static constexpr int bias = 127, mantissa = 23, terms = 7;
};

template <>
struct exponential<double> {
  typedef int64_t ints __attribute__((vector_size(MIK_VECTOR_BYTES)));
  static constexpr double least = -708.;
  static constexpr double round = 6755399441055744., per_ln2 = 0x1.71547652b82fep+0;
  static constexpr double ln2 = 0x1.62e42fefap-1, ln2_rest = 0x1.cf79abc9e3b3ap-40;
  static constexpr int bias = 1023, mantissa = 52, terms = 13;
};

template <class A>
static constexpr A over_factorial(int n) {
  return n < 2 ? A(1) : over_factorial<A>(n - 1) / A(n);
}

// 2^n as `power`, q as `rest`, for x in the range where both are finite
template <class A, class V>
static inline void exponential_parts(V x, V& power, V& rest) {
  using E = exponential<A>;
  using I = typename E::ints;
  const V shifted = x * E::per_ln2 + E::round;
  const V n = shifted - E::round;
  const V r = (x - n * E::ln2) - n * E::ln2_rest;
  V series = V{} + over_factorial<A>(E::terms);
#pragma GCC unroll 16
  for (int term = E::terms - 1; term >= 2; --term) series = series * r + over_factorial<A>(term);
  rest = r + r * r * series;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + E::bias) << E::mantissa;
  __builtin_memcpy(&power, &bits, sizeof(bits));
}

// of x <= 0 or NaN
template <class A, class V>
static inline V exp_of(V x) {
  V power, rest;
  exponential_parts<A>(x, power, rest);
  const V value = power + power * rest;
  return x < exponential<A>::least ? V{} : value;
}

template <class A, class V>
static inline V tanh_of(V x) {
  const V magnitude = x < 0 ? -x : x, twice = magnitude + magnitude;
  V power, rest;
  // tanh(20) is 1
  exponential_parts<A>(twice > 40 ? V{} + 40 : twice, power, rest);
  const V less_one = power * rest + (power - 1), value = less_one / (less_one + 2);
  return x < 0 ? -value : value;
}
