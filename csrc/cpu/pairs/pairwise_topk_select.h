// SPDX-License-Identifier: Apache-2.0
// Long rows, exact scores of single pairs, and each thread's list of candidates.
#pragma once

#include <atomic>
#include <cmath>
#include <vector>

#include "common.h"
#include "cpu/screen/candidates.h"
#include "cpu/pairs/row_products.h"
#include "cpu/pairs/pairwise_topk.h"
#include "cpu/screen/screen.h"

namespace mik {

// which pairs are wanted
struct PairRule {
  int64_t n, m, k;
  bool by_abs;
  double min_value;
  std::vector<int64_t> row_rank, col_rank;  // empty: every pair
  bool mirrored;

  const int64_t* rows() const { return row_rank.empty() ? nullptr : row_rank.data(); }
  const int64_t* cols() const { return col_rank.empty() ? nullptr : col_rank.data(); }
};

// rows [B, P, n, D], each one long row of B P D numbers, times a scale
template <class T>
class LongRows {
 public:
  LongRows(const Tensor& of, std::vector<double> scale) : of_(of), scale_(std::move(scale)) {}

  int64_t count() const { return of_.size(2); }
  int64_t length() const { return of_.size(0) * of_.size(1) * of_.size(3); }
  double scale(int64_t i) const { return scale_[i]; }
  const Tensor& tensor() const { return of_; }

  Rows<T> part(int64_t b, int64_t p) const {
    return {data<T>(of_) + b * of_.stride(0) + p * of_.stride(1), of_.stride(2), of_.stride(3)};
  }

  // row i where it lies, if it is dense there
  const T* dense(int64_t i) const {
    const bool whole = of_.size(0) * of_.size(1) <= 1 && (of_.stride(3) == 1 || of_.size(3) <= 1);
    return whole ? data<T>(of_) + i * of_.stride(2) : nullptr;
  }

  template <class Out>
  void copy(int64_t i, Out* to) const {
    for (int64_t b = 0; b < of_.size(0); ++b) {
      for (int64_t p = 0; p < of_.size(1); ++p) {
        const Rows<T> rows = part(b, p);
        const T* from = rows.at(i);
        for (int64_t k = 0; k < of_.size(3); ++k)
          *to++ = static_cast<Out>(static_cast<accumulator_t<T>>(from[k * rows.inner]));
      }
    }
  }

 private:
  const Tensor& of_;
  std::vector<double> scale_;
};

// scores of single pairs: fp64 sums, rounded once. One thread's
template <class T>
class ExactPairs {
 public:
  using S = accumulator_t<T>;

  ExactPairs(const LongRows<T>& a, const LongRows<T>& b, bool by_abs)
      : a_(a), b_(b), by_abs_(by_abs), left_(a.length()) {}

  void operator()(Pair<S>& pair) {
    if (pair.row != row_) {
      row_ = pair.row;
      a_.copy(row_, left_.data());
    }
    const int64_t d = a_.length();
    double dot;
    if constexpr (std::is_same_v<T, double>) {
      right_.resize(d);
      b_.copy(pair.col, right_.data());
      dot = 0;
      for (int64_t i = 0; i < d; ++i) dot += left_[i] * right_[i];
    } else if (const T* there = b_.dense(pair.col)) {
      dot = exact_dot(left_.data(), there, d);
    } else {
      right_.resize(d);
      b_.copy(pair.col, right_.data());
      dot = exact_dot(left_.data(), right_.data(), d);
    }
    pair.value = static_cast<S>(a_.scale(pair.row) * b_.scale(pair.col) * dot);
    pair.score = by_abs_ ? std::fabs(pair.value) : pair.value;
    pair.slack = -1;
  }

 private:
  const LongRows<T>&a_, &b_;
  const bool by_abs_;
  int64_t row_ = -1;
  std::vector<double> left_;
  std::vector<S> right_;
};

// a bound that every thread may raise
template <class S>
class SharedBound {
 public:
  explicit SharedBound(double least) : tau_(static_cast<S>(least)) {}

  S get() const { return tau_.load(std::memory_order_relaxed); }

  void raise(S to) {
    S now = get();
    while (now < to && !tau_.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<S> tau_;
};

// about k (1 + ln(n m / k)) pairs of random rows pass through a list; 4 k keeps compactions rare
inline int64_t pairs_capacity(const PairRule& rule) {
  const int64_t all = rule.m > INT64_MAX / 4 / rule.n ? INT64_MAX / 4 : rule.n * rule.m;
  return std::min(4 * rule.k + 64, 2 * all + 2);
}

// makes room in a full list: drops what cannot be wanted and, if that is little, scores the rest
template <class T>
int64_t thin_out(Pair<accumulator_t<T>>* pairs, int64_t size, int64_t capacity, int64_t k,
                 SharedBound<accumulator_t<T>>& bound, accumulator_t<T>* tau, ExactPairs<T>& exact,
                 std::vector<accumulator_t<T>>& scratch) {
  *tau = std::max(*tau, bound.get());
  size = tighten(pairs, size, k, tau, scratch);
  // bounds too wide to separate the candidates: spend the exact scores now
  if (size > capacity - capacity / 4) size = settle(pairs, size, k, tau, exact);
  bound.raise(*tau);
  return size;
}

// the k strongest of every thread's candidates, strongest first
template <class T>
std::vector<Pair<accumulator_t<T>>> strongest(std::vector<Pair<accumulator_t<T>>> all,
                                              const PairRule& rule, const LongRows<T>& a,
                                              const LongRows<T>& b,
                                              const SharedBound<accumulator_t<T>>& bound) {
  using S = accumulator_t<T>;
  using P = Pair<S>;
  S tau = bound.get();
  std::vector<S> scratch;
  all.resize(tighten(all.data(), static_cast<int64_t>(all.size()), rule.k, &tau, scratch));
  // a row is fetched once for all of its pairs
  std::sort(all.begin(), all.end(),
            [](const P& x, const P& y) { return x.row != y.row ? x.row < y.row : x.col < y.col; });
  parallel(static_cast<int64_t>(all.size()), 64, [&](int64_t begin, int64_t end) {
    ExactPairs<T> exact(a, b, rule.by_abs);
    for (int64_t i = begin; i < end; ++i)
      if (!all[i].exact()) exact(all[i]);
  });
  std::erase_if(all, [&](const P& p) { return static_cast<double>(p.score) < rule.min_value; });
  all.resize(keep_best(all.data(), static_cast<int64_t>(all.size()), rule.k));
  std::sort(all.begin(), all.end(), [](const P& x, const P& y) { return better(x, y); });
  return all;
}

}  // namespace mik
