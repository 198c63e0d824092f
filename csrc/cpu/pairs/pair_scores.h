// SPDX-License-Identifier: Apache-2.0
// Where sums of products over examples and positions go: scores[q, row, col].
#pragma once

#include "cpu/pairs/row_products.h"

namespace mik {

// guards of scores [Q, n, m], weights [Q, S] and prefix [m] for operands [S, P, n, ...]
inline void check_scores(const Tensor& a, int64_t m, const OptionalTensor& weights,
                         const OptionalTensor& prefix, const Tensor& out) {
  const auto wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(out.dim() == 3 && out.size(1) == a.size(2) && out.size(2) == m && out.scalar_type() == wide,
        "scores must be [Q, n, m] in fp32 (fp64 for fp64)");
  check(weights.has_value() ? weights->dim() == 2 && weights->size(0) == out.size(0) &&
                                  weights->size(1) == a.size(0) && weights->scalar_type() == wide
                            : out.size(0) == 1,
        "weights must be [Q, S] in the dtype of the scores, Q = 1 without them");
  check(!prefix.has_value() || (prefix->dim() == 1 && prefix->size(0) == m &&
                                prefix->scalar_type() == ScalarType::Long),
        "prefix must be [m] int64");
}

// scores[q, row, col] += sum_s weights[q, s] sums[s, row, col] for row < limits[col]
template <class A>
class PairScores {
 public:
  // out: [Q, n, m] or [n, m]. prefix: the limits; symmetric: row <= col is computed and mirrored
  PairScores(const Tensor& out, const OptionalTensor& weights, const OptionalTensor& prefix,
             bool symmetric)
      : out_(mutable_data<A>(out)),
        q_(out.dim() == 3 ? out.stride(0) : 0),
        row_(out.stride(out.dim() - 2)),
        col_(out.stride(out.dim() - 1)),
        replicates_(out.dim() == 3 ? out.size(0) : 1),
        symmetric_(symmetric) {
    weighted_ = weights.has_value();
    if (weighted_) {
      weights_ = data<A>(*weights);
      weights_q_ = weights->stride(0);
      weights_s_ = weights->stride(1);
    }
    limited_ = symmetric || prefix.has_value();
    if (limited_)
      for (int64_t j = 0; j < out.size(out.dim() - 1); ++j)
        limits_.push_back(symmetric ? j + 1 : data<int64_t>(*prefix)[j * prefix->stride(0)]);
  }

  // examples are told apart
  bool weighted() const { return weighted_; }

  const int64_t* limits() const { return limited_ ? limits_.data() : nullptr; }
  const int64_t* limits(const Block& block) const {
    return limited_ ? limits_.data() + block.col : nullptr;
  }

  // one(s) adds example s to the block's sums, which start at 0 and are [rows, cols]
  template <class One>
  void add(const Block& block, int64_t examples, std::vector<double>& sums, const One& one) const {
    sums.assign(block.rows * block.cols, 0.);
    for (int64_t s = 0; s < examples; ++s) {
      one(s);
      if (!weighted_) continue;
      for (int64_t q = 0; q < replicates_; ++q)
        flush(block, q, static_cast<double>(weights_[q * weights_q_ + s * weights_s_]), sums);
      sums.assign(block.rows * block.cols, 0.);
    }
    if (!weighted_) flush(block, 0, 1., sums);
  }

 private:
  A* out_;
  const int64_t q_, row_, col_, replicates_;
  const bool symmetric_;
  // flags, since null pointers do not tell: those of empty tensors are null too
  bool limited_ = false, weighted_ = false;
  const A* weights_ = nullptr;
  int64_t weights_q_ = 0, weights_s_ = 0;
  std::vector<int64_t> limits_;

  // rows that are written together where limits cut a block
  static constexpr int64_t kRowsTogether = 16;

  void flush(const Block& block, int64_t q, double weight, const std::vector<double>& sums) const {
    for (int64_t i = 0; i < block.rows; i += kRowsTogether) {
      const int64_t rows = limited_ ? std::min(kRowsTogether, block.rows - i) : block.rows;
      // from here on every column wants all of these rows, and none is its own mirror image
      int64_t whole = col_ == 1 ? 0 : block.cols;
      if (limited_ && col_ == 1) {
        const int64_t last = block.row + i + rows - 1 + (symmetric_ ? 1 : 0);
        whole = block.cols;
        while (whole > 0 && limits_[block.col + whole - 1] > last) --whole;
      }
      flush_some({block.row + i, rows, block.col, whole}, q, weight, &sums[i * block.cols],
                 block.cols);
      if (whole < block.cols) {
        A* const out = out_ + q * q_;
        const int64_t row = block.row + i, col = block.col + whole;
        add_scores(&sums[i * block.cols + whole], block.cols, rows, block.cols - whole, weight,
                   row_, out + row * row_ + col, symmetric_ ? out + col * row_ + row : nullptr);
      }
      if (!limited_) return;
    }
  }

  // pair by pair; where columns are dense by the same function as elsewhere, since another might
  // round otherwise, and what is whole depends on how pairs are shared out
  void flush_some(const Block& block, int64_t q, double weight, const double* sums,
                  int64_t ld) const {
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.row + i;
      for (int64_t j = 0, last; j < block.cols; j = last) {
        last = j + 1;
        const int64_t col = block.col + j;
        if (limited_ && row >= limits_[col]) continue;
        const bool twice = symmetric_ && row != col;
        if (col_ == 1) {
          // a run of columns that want the row; the diagonal is one of its own
          while ((twice || !symmetric_) && last < block.cols && row < limits_[block.col + last])
            ++last;
          A* const out = out_ + q * q_;
          add_scores(&sums[i * ld + j], ld, 1, last - j, weight, row_, out + row * row_ + col,
                     twice ? out + col * row_ + row : nullptr);
          continue;
        }
        const A term = static_cast<A>(weight * sums[i * ld + j]);
        out_[q * q_ + row * row_ + col * col_] += term;
        if (twice) out_[q * q_ + col * row_ + row * col_] += term;
      }
    }
  }
};

}  // namespace mik
