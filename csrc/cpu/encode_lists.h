// SPDX-License-Identifier: Apache-2.0
// What happens to a token's candidates: tightening the bound, exact rescoring, the final selection.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/encode.h"
#include "cpu/levels.h"
#include "cpu/order.h"

namespace mik {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline bool better(const Candidate& a, const Candidate& b) {
  const int32_t ka = rank_key(a.score), kb = rank_key(b.score);
  return ka != kb ? ka > kb : a.feature < b.feature;
}

// NaN ranks first, so an exact NaN bounds from above; an unknown (NaN) bound bounds nothing
inline float lower_bound(const Candidate& c) {
  if (c.exact()) return c.score == c.score ? c.score : kInfinity;
  const float bound = c.score - c.slack;
  return bound == bound ? bound : -kInfinity;
}

inline bool may_reach(const Candidate& c, float tau) {
  return !((c.exact() ? c.score : c.score + c.slack) < tau);
}

// keeps the k best of exact candidates, unordered
inline int32_t keep_best(Candidate* list, int32_t size, int64_t k) {
  if (size <= k) return size;
  std::nth_element(list, list + k - 1, list + size, better);
  return static_cast<int32_t>(k);
}

// raises tau to the k-th largest lower bound and drops what cannot reach it
inline int32_t tighten(Candidate* list, int32_t size, int64_t k, float* tau,
                       std::vector<float>& scratch) {
  if (size >= k) {
    scratch.resize(size);
    for (int32_t i = 0; i < size; ++i) scratch[i] = lower_bound(list[i]);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                     [](float a, float b) { return a > b; });
    *tau = std::max(*tau, scratch[k - 1]);
  }
  const float bound = *tau;
  return static_cast<int32_t>(
      std::remove_if(list, list + size, [&](const Candidate& c) { return !may_reach(c, bound); }) -
      list);
}

// makes all candidates exact and keeps the k best. `score(candidate)` computes one. The k that look
// best go first: their worst exact score is a bound without slack, and spares most of the others
template <class Score>
int32_t settle(Candidate* list, int32_t size, int64_t k, float* tau, const Score& score) {
  int32_t first = size;
  if (size > k) {
    std::nth_element(list, list + k - 1, list + size, better);
    first = static_cast<int32_t>(k);
  }
  float worst = kInfinity;
  for (int32_t i = 0; i < first; ++i) {
    if (!list[i].exact()) score(list[i]);
    worst = std::min(worst, lower_bound(list[i]));
  }
  if (first == k) *tau = std::max(*tau, worst);
  int32_t kept = first;
  for (int32_t i = first; i < size; ++i) {
    if (!may_reach(list[i], *tau)) continue;
    list[kept] = list[i];
    if (!list[kept].exact()) score(list[kept]);
    ++kept;
  }
  return keep_best(list, kept, k);
}

}  // namespace mik
