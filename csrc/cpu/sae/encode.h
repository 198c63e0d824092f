// SPDX-License-Identifier: Apache-2.0
// What the screen (encode_body.h, per level) and its drivers share.
#pragma once

#include <cstdint>

#include "cpu/select/order.h"
#include "cpu/screen/coarse.h"
#include "cpu/screen/screen.h"

namespace mik {

struct Candidate {
  float score;  // screened, or exact
  float slack;  // |true score - score| at most; negative once the score is exact
  float value;  // h of an exact candidate
  int32_t feature;

  bool exact() const { return slack < 0; }
};

inline bool better(const Candidate& a, const Candidate& b) {
  const int32_t ka = rank_key(a.score), kb = rank_key(b.score);
  return ka != kb ? ka > kb : a.feature < b.feature;
}

// features in 16 bits, or in 8: row f is scale[f] * its numbers, and the error bound of its scores
// is error[n] * p[f] + norm[n] * q[f] + r[f] (equation 1 of mikernels/ops/sae/encode.py, times
// |rank|)
struct FeatureTerms {
  const float *scale, *bias, *rank, *p, *q, *r;
};

// tokens in 16 bits, or in 8: row n is scale[n] * its numbers; error and norm bound |x - x^| and
// |x^|
struct TokenTerms {
  const float *scale, *error, *norm;
};

// one panel of quantised features
struct Panel {
  const uint16_t* rows;
  int64_t row_stride;
  int64_t count;
  int64_t first_feature;
  FeatureTerms terms;
  // for a Found with kFloors: what a score has to reach, in place of its token's tau
  const float* floor;
  // the same in 8 bits, with what their products start at; where Tokens have a course
  const int8_t* bytes;
  const int32_t* start;
  FeatureTerms byte_terms;
};

// quantised tokens; tau is the best known lower bound of the k-th score
struct Tokens {
  const uint16_t* tiles;
  int64_t tile_stride;
  int64_t pairs;
  int64_t count;
  TokenTerms terms;
  float* tau;
  // the same in 8 bits, in 16-bit rows for what passes, and a course per tile, of which a block's
  // first is used; null where there is no coarse screen
  const uint8_t* byte_tiles;
  const uint16_t* rows;
  TokenTerms byte_terms;
  CoarseCourse* courses;
};

// The candidates of every token, `capacity` each, in arrays of their own: what their scores are at
// least and at most, h and the feature. A score that is known is exact, low = high, and has
// ~feature; NaN, which ranks first, has low = high = inf. make_room(context, token) is called when
// a list has reached its limit
struct Lists {
  // features come in ascending order, and of equal scores the first are selected
  static constexpr bool kFloors = false, kStrict = true;

  float *low, *high, *value;
  int32_t *feature, *sizes, *limits;
  int64_t capacity;
  void* context;
  void (*make_room)(void* context, int64_t token);

  const float* bounds(const Tokens& tokens, int64_t, int64_t n) const { return tokens.tau + n; }

  void add(int64_t token, int64_t f, float score, float slack) {
    const int64_t at = token * capacity + sizes[token]++;
    const float lowest = score - slack, highest = score + slack;
    low[at] = lowest == lowest ? lowest : -kInfinity;
    high[at] = highest == highest ? highest : kInfinity;
    feature[at] = static_cast<int32_t>(f);
    if (sizes[token] >= limits[token]) make_room(context, token);
  }
};

}  // namespace mik
