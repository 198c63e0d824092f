// SPDX-License-Identifier: Apache-2.0
// Pairs of rows too long for 16 bits, and of fp64 rows: products in the accumulator type, block by
// block, each score within a bound (fp64: exact).
#pragma once

#include "cpu/pairs/pairwise_topk_select.h"

namespace mik {

template <class T>
class WidePairs {
 public:
  using S = accumulator_t<T>;

  WidePairs(const LongRows<T>& a, const LongRows<T>& b, const PairRule& rule)
      : a_(a), b_(b), rule_(rule), bound_(rule.min_value) {}

  std::vector<Pair<S>> run() {
    row_norms_ = norms(a_);
    col_norms_ = norms(b_);
    const auto blocks = blocks_of(rule_.n, rule_.m, kPairRows, kPairCols, nullptr);
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<std::vector<Pair<S>>> found(threads);
    std::atomic<size_t> next{0};
    parallel(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Worker worker(*this);
        for (size_t i; (i = next.fetch_add(1)) < blocks.size();) worker.add(blocks[i]);
        worker.pairs.resize(worker.size);
        found[t] = std::move(worker.pairs);
      }
    });
    std::vector<Pair<S>> all;
    for (const auto& one : found) all.insert(all.end(), one.begin(), one.end());
    return strongest<T>(std::move(all), rule_, a_, b_, bound_);
  }

 private:
  struct Worker {
    explicit Worker(WidePairs& owner)
        : all(owner),
          exact(owner.a_, owner.b_, owner.rule_.by_abs),
          pairs(pairs_capacity(owner.rule_)) {}

    void add(const Block& block) {
      const PairRule& rule = all.rule_;
      const int64_t *rows = rule.rows(), *cols = rule.cols();
      if (rows != nullptr && *std::min_element(rows + block.row, rows + block.row + block.rows) >=
                                 *std::max_element(cols + block.col, cols + block.col + block.cols))
        return;
      const Tensor& of = all.a_.tensor();
      sums.assign(block.rows * block.cols, 0.);
      for (int64_t b = 0; b < of.size(0); ++b)
        for (int64_t p = 0; p < of.size(1); ++p)
          product.add(all.a_.part(b, p), all.b_.part(b, p), block, of.size(3), nullptr,
                      sums.data());
      tau = std::max(tau, all.bound_.get());
      for (int64_t i = 0; i < block.rows; ++i)
        for (int64_t j = 0; j < block.cols; ++j)
          offer(block.row + i, block.col + j, sums[i * block.cols + j]);
    }

    void offer(int64_t row, int64_t col, double sum) {
      const PairRule& rule = all.rule_;
      if (rule.rows() != nullptr && rule.row_rank[row] >= rule.col_rank[col]) return;
      const double factor = all.a_.scale(row) * all.b_.scale(col), wide = factor * sum;
      Pair<S> pair{static_cast<S>(rule.by_abs ? std::fabs(wide) : wide), -1, static_cast<S>(wide),
                   static_cast<int32_t>(row), static_cast<int32_t>(col)};
      if constexpr (!std::is_same_v<T, double>) {
        const double size = std::fabs(factor) * all.row_norms_[row] * all.col_norms_[col];
        const bool safe = size == 0 || (size >= kSmallestNorm * kSmallestNorm &&
                                        size <= kLargestNorm * kLargestNorm);
        pair.slack = safe ? static_cast<S>(size * kRounding) : kInfinity;
      }
      if (!may_reach(pair, tau)) return;
      if (size + 2 > static_cast<int64_t>(pairs.size()))
        size = thin_out<T>(pairs.data(), size, static_cast<int64_t>(pairs.size()), rule.k,
                           all.bound_, &tau, exact, scratch);
      pairs[size++] = pair;
      if (rule.mirrored && row != col) {
        std::swap(pair.row, pair.col);
        pairs[size++] = pair;
      }
    }

    WidePairs& all;
    ExactPairs<T> exact;
    BlockProduct<T> product;
    std::vector<Pair<S>> pairs;
    std::vector<S> scratch;
    std::vector<double> sums;
    int64_t size = 0;
    S tau = all.bound_.get();
  };

  // of |a| |b|: fp32 sums of at most kChunk + 16 products in any order, and the score's own
  // rounding
  static_assert(kAcrossChunk <= kChunk);
  static constexpr double kRounding = (kChunk + 48) * 0x1p-24 * kUp;

  const LongRows<T>&a_, &b_;
  const PairRule& rule_;
  SharedBound<S> bound_;
  std::vector<double> row_norms_, col_norms_;

  // norms that fp32 sums keep clear of their limits; infinite where they would not, so that such
  // pairs are scored exactly
  static std::vector<double> norms(const LongRows<T>& of) {
    std::vector<double> found(of.count());
    if (std::is_same_v<T, double>) return found;
    parallel(of.count(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> row(of.length());
      for (int64_t i = begin; i < end; ++i) {
        of.copy(i, row.data());
        double squares = 0;
        for (double x : row) squares += x * x;
        const double norm = std::sqrt(squares);
        found[i] = norm == 0 || (norm >= kSmallestNorm && norm <= kLargestNorm) ? norm : kInfinity;
      }
    });
    return found;
  }
};

}  // namespace mik
