// SPDX-License-Identifier: Apache-2.0
// The pairs of token and feature that may be among the `total` best of a batch, from all threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "common.h"
#include "cpu/screen/candidates.h"
#include "cpu/screen/screen.h"

namespace mik {

template <class S>
struct BatchCandidate {
  S score;  // screened, or exact
  S slack;  // |true score - score| at most; negative once the score is exact
  S value;  // h of an exact candidate
  int32_t feature;
  int32_t token;

  bool exact() const { return slack < 0; }
  bool known() const { return slack < kInfinity; }
};

template <class S>
bool better(const BatchCandidate<S>& a, const BatchCandidate<S>& b) {
  const auto ka = rank_key(a.score), kb = rank_key(b.score);
  if (ka != kb) return ka > kb;
  return a.token != b.token ? a.token < b.token : a.feature < b.feature;
}

// `out` gets the candidates by token, in no order within one; returns where each token begins
template <class S>
std::vector<int64_t> by_token(const BatchCandidate<S>* list, int64_t size, int64_t tokens,
                              std::vector<BatchCandidate<S>>& out) {
  std::vector<int64_t> begins(tokens + 1), next;
  for (int64_t i = 0; i < size; ++i) ++begins[list[i].token + 1];
  for (int64_t n = 0; n < tokens; ++n) begins[n + 1] += begins[n];
  next = begins;
  out.resize(size);
  for (int64_t i = 0; i < size; ++i) out[next[list[i].token]++] = list[i];
  return begins;
}

template <class S>
class BatchPool {
 public:
  using C = BatchCandidate<S>;

  // of `all` pairs
  BatchPool(int64_t total, int64_t all, int64_t tokens)
      : total_(total), tokens_(tokens), list_(std::min(2 * total + kSpare, all + 1)) {}

  // no pair below it is among the `total` best
  S bound() const { return bound_.load(std::memory_order_relaxed); }

  // bounds do not separate these scores: whoever finds a candidate computes it, in parallel
  bool is_wide() const { return wide_.load(std::memory_order_relaxed); }

  // takes what still may be wanted. `score(token, candidates, count)` computes a token's candidates
  template <class Score>
  void add(const C* found, int64_t count, const Score& score) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < count; ++i) {
      if (!may_reach(found[i], bound())) continue;
      list_[size_++] = found[i];
      if (size_ == static_cast<int64_t>(list_.size())) make_room(score);
    }
  }

  // makes all candidates exact and keeps the `total` best. Those that look best go first: their
  // worst exact score is a bound without slack, and spares most of the others
  template <class Score>
  void settle(const Score& score) {
    const int64_t first = keep_best(list_.data(), size_, total_);
    make_exact(0, first, score);
    if (first == total_ && total_ > 0) {
      S worst = std::numeric_limits<S>::infinity();
      for (int64_t i = 0; i < first; ++i) worst = std::min(worst, lower_bound(list_[i]));
      raise(worst);
    }
    C* rest = list_.data() + first;
    const S tau = bound();
    size_ = std::remove_if(rest, list_.data() + size_,
                           [&](const C& c) { return !may_reach(c, tau); }) -
            list_.data();
    make_exact(first, size_, score);
    size_ = keep_best(list_.data(), size_, total_);
  }

  const C* data() const { return list_.data(); }
  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kSpare = 4096;

  const int64_t total_, tokens_;
  std::vector<C> list_;
  int64_t size_ = 0;
  std::atomic<S> bound_{-std::numeric_limits<S>::infinity()};
  std::atomic<bool> wide_{false};
  std::mutex mutex_;
  std::vector<S> scratch_;

  void raise(S to) {
    if (to > bound()) bound_.store(to, std::memory_order_relaxed);
  }

  template <class Score>
  void make_room(const Score& score) {
    S tau = bound();
    size_ = tighten(list_.data(), size_, total_, &tau, scratch_);
    raise(tau);
    const int64_t capacity = static_cast<int64_t>(list_.size());
    if (size_ <= capacity - capacity / 4) return;
    wide_.store(true, std::memory_order_relaxed);
    settle(score);
  }

  // the scores of list[begin..end), a token's together, so that its row is fetched once
  template <class Score>
  void make_exact(int64_t begin, int64_t end, const Score& score) {
    if (std::all_of(list_.begin() + begin, list_.begin() + end,
                    [](const C& c) { return c.exact(); }))
      return;
    std::vector<C> grouped;
    const auto begins = by_token(list_.data() + begin, end - begin, tokens_, grouped);
    parallel(tokens_, 16, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        if (begins[n] < begins[n + 1])
          score(n, grouped.data() + begins[n], begins[n + 1] - begins[n]);
    });
    std::copy(grouped.begin(), grouped.end(), list_.begin() + begin);
  }
};

}  // namespace mik
