// SPDX-License-Identifier: Apache-2.0
// What the screen of pairs (pairwise_topk_body.h, per level) and its driver share.
#pragma once

#include <cstdint>

#include "cpu/screen/coarse.h"
#include "cpu/select/order.h"

namespace mik {

// a pair that may be among the k strongest; S is fp32, or fp64 for fp64 operands
template <class S>
struct Pair {
  S score;  // the strength, |s| or s: screened, or exact
  S slack;  // |true strength - score| at most; negative once the score is exact
  S value;  // s of an exact pair
  int32_t row, col;

  bool exact() const { return slack < 0; }
};

template <class S>
bool better(const Pair<S>& a, const Pair<S>& b) {
  const auto ka = rank_key(a.score), kb = rank_key(b.score);
  if (ka != kb) return ka > kb;
  return a.row != b.row ? a.row < b.row : a.col < b.col;
}

// one side, quantised: row i is scale[i] * numbers, with the terms of its bound. A pair (i, j) is
// allowed where the row's rank is below the column's; ranks are null where every pair is
struct ScreenSide {
  const uint16_t* numbers;  // tiles of 16 rows, or dense rows
  int64_t padded, first, count;
  const float *scale, *p, *q;
  const int64_t* rank;
  // the same in bytes where there is a coarse screen, with what their products start at (dense
  // rows), and what the tiles hold as dense rows of 16 bits
  const void* bytes;
  const int32_t* start;
  const float *byte_scale, *byte_p, *byte_q;
  const uint16_t* rows;
};

// a thread's pairs. make_room leaves space for two more and may raise tau, below which no strength
// is wanted
struct PairList {
  Pair<float>* pairs;
  int64_t size, capacity;
  float tau;
  bool by_abs, mirrored;
  CoarseCourse* course;  // null where there is no coarse screen
  void* context;
  void (*make_room)(PairList&);
};

}  // namespace mik
