// SPDX-License-Identifier: Apache-2.0
// What happens to a list of candidates: tightening the bound, exact rescoring, the final selection.
// A candidate has a score, a slack (|true score - score| at most; negative once the score is
// exact), exact(), and better(a, b), the order of selection.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/select/order.h"

namespace mik {

// NaN ranks first, so an exact NaN bounds from above; an unknown (NaN) bound bounds nothing
template <class C>
auto lower_bound(const C& c) {
  using S = decltype(c.score);
  constexpr S unknown = std::numeric_limits<S>::infinity();
  if (c.exact()) return c.score == c.score ? c.score : unknown;
  const S bound = c.score - c.slack;
  return bound == bound ? bound : -unknown;
}

template <class C, class S>
bool may_reach(const C& c, S tau) {
  return !((c.exact() ? c.score : c.score + c.slack) < tau);
}

// keeps the k best of exact candidates, unordered
template <class C>
int64_t keep_best(C* list, int64_t size, int64_t k) {
  if (size <= k) return size;
  std::nth_element(list, list + k - 1, list + size,
                   [](const C& a, const C& b) { return better(a, b); });
  return k;
}

// raises tau to the k-th largest lower bound and drops what cannot reach it
template <class C, class S>
int64_t tighten(C* list, int64_t size, int64_t k, S* tau, std::vector<S>& scratch) {
  if (size >= k) {
    scratch.resize(size);
    for (int64_t i = 0; i < size; ++i) scratch[i] = lower_bound(list[i]);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                     [](S a, S b) { return a > b; });
    *tau = std::max(*tau, scratch[k - 1]);
  }
  const S bound = *tau;
  return std::remove_if(list, list + size, [&](const C& c) { return !may_reach(c, bound); }) - list;
}

// makes all candidates exact and keeps the k best. `score(candidate)` computes one. The k that look
// best go first: their worst exact score is a bound without slack, and spares most of the others
template <class C, class S, class Score>
int64_t settle(C* list, int64_t size, int64_t k, S* tau, Score&& score) {
  const int64_t first = keep_best(list, size, k);
  S worst = std::numeric_limits<S>::infinity();
  for (int64_t i = 0; i < first; ++i) {
    if (!list[i].exact()) score(list[i]);
    worst = std::min(worst, lower_bound(list[i]));
  }
  if (first == k) *tau = std::max(*tau, worst);
  int64_t kept = first;
  for (int64_t i = first; i < size; ++i) {
    if (!may_reach(list[i], *tau)) continue;
    list[kept] = list[i];
    if (!list[kept].exact()) score(list[kept]);
    ++kept;
  }
  return keep_best(list, kept, k);
}

}  // namespace mik
