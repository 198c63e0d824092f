// SPDX-License-Identifier: Apache-2.0
// What the screen (encode_body.h, per level) and its drivers share.
#pragma once

#include <cstdint>

#include "cpu/select/order.h"
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

// one panel of quantised features: row f is scale[f] * q[f], and the error bound of its scores is
// ex[n] * p[f] + nx[n] * q[f] + r[f] (equation 1 of mikernels/ops/sae/encode.py, times |rank|)
struct Panel {
  const uint16_t* rows;
  int64_t row_stride;
  int64_t count;
  int64_t first_feature;
  const float *scale, *bias, *rank, *p, *q, *r;
  // for a Found with kFloors: what a score has to reach, in place of its token's tau
  const float* floor;
};

// quantised tokens: x[n] is sx[n] * q; ex and nx bound |x - x^| and |x^|; tau is the best known
// lower bound of the k-th score
struct Tokens {
  const uint16_t* tiles;
  int64_t tile_stride;
  int64_t pairs;
  int64_t count;
  const float *sx, *ex, *nx;
  float* tau;
};

// the candidates of every token, `capacity` each; make_room(context, token) is called on a full
// list and leaves space in it
struct Lists {
  static constexpr bool kFloors = false;

  Candidate* candidates;
  int32_t* sizes;
  int64_t capacity;
  void* context;
  void (*make_room)(void* context, int64_t token);

  const float* bounds(const Tokens& tokens, int64_t, int64_t n) const { return tokens.tau + n; }

  void add(int64_t token, int64_t feature, float score, float slack) {
    Candidate* list = candidates + token * capacity;
    list[sizes[token]++] = {score, slack, 0.f, static_cast<int32_t>(feature)};
    if (sizes[token] == capacity) make_room(context, token);
  }
};

}  // namespace mik
