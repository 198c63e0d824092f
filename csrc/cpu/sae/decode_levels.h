// SPDX-License-Identifier: Apache-2.0
// What decode_levels and its loops (decode_levels_body.h, per level) share.
#pragma once

#include <cstdint>

namespace mik {

// operands and outputs of decode_levels; bias may be null
template <class T, class A>
struct DecodeLevels {
  int64_t n, d, count;
  const T* values;
  const int64_t* indices;
  const T* w;
  int64_t w_row;
  const T* bias;
  const A* x;
  int64_t x_row;
  const int64_t* levels;
  const float* mix;
  A *mixed, *error, *squares;
};

// memory of one thread, for L levels: errors [L, d] of the prefixes; rows and weights of as many
// slots as one token has; ends [L + 1] of the levels among them; of every level the prefixes that
// are mixed, sources and shares [L, L], and their number [L]
template <class T, class A>
struct LevelScratch {
  A* errors;
  const T** rows;
  A* weights;
  int64_t* ends;
  const A** sources;
  A* shares;
  int64_t* mixes;
};

}  // namespace mik
