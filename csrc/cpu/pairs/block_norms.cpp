// SPDX-License-Identifier: Apache-2.0
// block_norms: out[i, j] = |a[i] b[j]|_F; a block of columns of b meets every row of a.
#include "common.h"
#include "cpu/pairs/row_products.h"

#include <cmath>

namespace mik {
namespace {

template <class T>
class BlockNorms {
 public:
  using A = accumulator_t<T>;

  BlockNorms(const Tensor& a, const Tensor& b, const Tensor& out) : a_(a), b_(b), out_(out) {}

  // matrices first..last of b with all of a
  void run(int64_t first, int64_t last) {
    const int64_t n = a_.size(0), wide = b_.size(2), count = (last - first) * wide;
    squares_.assign(n * (last - first), 0.);
    for (int64_t c = 0; c < count; c += kPairCols) {
      const int64_t cols = std::min(kPairCols, count - c);
      gather(first, c, cols);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < a_.size(1); r += kPairRows)
          add(i, {r, std::min(kPairRows, a_.size(1) - r), 0, cols}, c, wide, last - first);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = first; j < last; ++j)
        mutable_data<A>(out_)[i * b_.size(0) + j] =
            static_cast<A>(std::sqrt(squares_[i * (last - first) + j - first]));
  }

 private:
  const Tensor &a_, &b_, &out_;
  Scratch<A> columns_;
  std::vector<double> sums_, squares_;
  BlockProduct<T> product_;

  // columns c..c + cols of the matrices from `first` on, side by side
  void gather(int64_t first, int64_t c, int64_t cols) {
    const int64_t d = b_.size(1), wide = b_.size(2), row = b_.stride(1), inner = b_.stride(2);
    A* const columns = columns_.take(cols * d);
    for (int64_t e = 0; e < cols; ++e) {
      const T* from =
          data<T>(b_) + (first + (c + e) / wide) * b_.stride(0) + (c + e) % wide * inner;
      for (int64_t k = 0; k < d; ++k) columns[k * cols + e] = static_cast<A>(from[k * row]);
    }
  }

  void add(int64_t i, const Block& block, int64_t c, int64_t wide, int64_t matrices) {
    const int64_t d = b_.size(1);
    sums_.assign(block.rows * block.cols, 0.);
    const Rows<T> rows{data<T>(a_) + i * a_.stride(0), a_.stride(1), a_.stride(2)};
    product_.add(rows, Rows<A>{columns_.data(), 1, block.cols}, block, d, nullptr, sums_.data());
    // parts of the columns that are of one matrix
    for (int64_t e = 0, last; e < block.cols; e = last) {
      const int64_t matrix = (c + e) / wide;
      last = std::min(block.cols, (matrix + 1) * wide - c);
      for (int64_t r = 0; r < block.rows; ++r)
        squares_[i * matrices + matrix] += sum_squares(&sums_[r * block.cols + e], last - e);
    }
  }
};

Tensor block_norms(Tensor a, Tensor b) {
  check(
      a.dim() == 3 && b.dim() == 3 && a.size(2) == b.size(1) && a.scalar_type() == b.scalar_type(),
      "block_norms: expected a [n, r, d] and b [m, d, s] of one dtype");
  const auto wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = empty(a, {a.size(0), b.size(0)}, wide);
  // matrices of b that fill a block of columns
  const int64_t together = std::max<int64_t>(2 * kPairCols / std::max<int64_t>(b.size(2), 1), 1);
  MIK_DISPATCH_FLOATING(a, [&] {
    parallel((b.size(0) + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
      BlockNorms<scalar_t> norms(a, b, out);
      for (int64_t i = begin; i < end; ++i)
        norms.run(i * together, std::min(b.size(0), (i + 1) * together));
    });
  });
  return out;
}

MIK_REGISTER(CPU, m) { m.impl("block_norms", TORCH_BOX(&block_norms)); }

}  // namespace
}  // namespace mik
