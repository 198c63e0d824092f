// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the level's registers, for arithmetic that operators spell (+, *); what they
// cannot is in vectors_body.h. Part of a body, so no include guard.

typedef float wide_floats __attribute__((vector_size(MIK_VECTOR_BYTES)));
typedef double wide_doubles __attribute__((vector_size(MIK_VECTOR_BYTES)));
// of the accumulator type
template <class A>
struct wide {
  using type = wide_floats;
};
template <>
struct wide<double> {
  using type = wide_doubles;
};

template <class V, class A>
static inline V load_wide(const A* at) {
  V v;
  __builtin_memcpy(&v, at, sizeof(v));
  return v;
}
