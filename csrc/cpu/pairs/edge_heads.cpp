// SPDX-License-Identifier: Apache-2.0
// edge_heads_: out[q, h, r] += sum_s weights[q, s] sum_p <dz[s, p, h] w_o[h], grad[s, p, r]>.
//
// A few heads' rows are formed for a few positions and a chunk of d at a time, so that they, and
// the part of w_o that makes them, stay in the second-level cache until they have met the
// gradients.
#include "common.h"
#include "cpu/pairs/weighted_rows.h"
#include "cpu/pairs/pair_scores.h"

namespace mik {
namespace {

constexpr int64_t kHeads = 8, kPositions = 4 * kSumRows, kWidth = 8 * kSumCols;

template <class T>
class EdgeHeads {
 public:
  using A = accumulator_t<T>;

  EdgeHeads(const Tensor& dz, const Tensor& w_o, const Tensor& grad)
      : dz_(dz), w_o_(w_o), grad_(grad) {}

  // sums[h, r] += one example's products of a block of heads and readers
  void add(const Block& block, int64_t s, const int64_t* limits, double* sums) {
    const int64_t positions = dz_.size(1), d = w_o_.size(2);
    for (int64_t p = 0; p < positions; p += kPositions) {
      const int64_t here = std::min(kPositions, positions - p);
      for (int64_t k = 0; k < d; k += kWidth) {
        const int64_t wide = std::min(kWidth, d - k);
        for (int64_t h = 0; h < block.rows; ++h) form(block.row + h, h, s, p, here, k, wide);
        for (int64_t t = 0; t < here; ++t) {
          const Rows<A> formed{rows_.data() + t * kWidth - block.row * kPositions * kWidth,
                               kPositions * kWidth, 1};
          const Rows<T> grads{data<T>(grad_) + s * grad_.stride(0) + (p + t) * grad_.stride(1) +
                                  k * grad_.stride(3),
                              grad_.stride(2), grad_.stride(3)};
          product_.add(formed, grads, block, wide, limits, sums);
        }
      }
    }
  }

 private:
  const Tensor &dz_, &w_o_, &grad_;
  std::vector<A> rows_ = std::vector<A>(kHeads * kPositions * kWidth), z_;
  Columns<T> columns_;
  BlockProduct<T> product_;

  // rows[slot, t, 0:wide] = dz[s, p + t, head] w_o[head, :, k:k + wide]
  void form(int64_t head, int64_t slot, int64_t s, int64_t p, int64_t here, int64_t k,
            int64_t wide) {
    const int64_t depth = dz_.size(3);
    const T* z = data<T>(dz_) + s * dz_.stride(0) + head * dz_.stride(2);
    z_.assign(kPositions * depth, A(0));
    for (int64_t t = 0; t < here; ++t)
      for (int64_t e = 0; e < depth; ++e)
        z_[(t / kSumRows * depth + e) * kSumRows + t % kSumRows] =
            static_cast<A>(z[(p + t) * dz_.stride(1) + e * dz_.stride(3)]);
    const Rows<T> w{data<T>(w_o_) + head * w_o_.stride(0), w_o_.stride(1), w_o_.stride(2)};
    A tile[kSumRows * kSumCols];
    for (int64_t first = 0; first < wide; first += kSumCols) {
      const int64_t cols = std::min<int64_t>(kSumCols, wide - first);
      columns_.take(w, depth, k + first, cols);
      for (int64_t t = 0; t < here; t += kSumRows) {
        weighted_rows(z_.data() + t * depth, columns_.at, columns_.ld, depth, tile);
        for (int64_t r = 0; r < std::min<int64_t>(kSumRows, here - t); ++r)
          std::copy_n(tile + r * kSumCols, cols,
                      rows_.data() + (slot * kPositions + t + r) * kWidth + first);
      }
    }
  }
};

void edge_heads(Tensor dz, Tensor w_o, Tensor grad, OptionalTensor weights, OptionalTensor prefix,
                Tensor out) {
  check(dz.dim() == 4 && w_o.dim() == 3 && grad.dim() == 4 && w_o.size(0) == dz.size(2) &&
            w_o.size(1) == dz.size(3) && grad.size(0) == dz.size(0) && grad.size(1) == dz.size(1) &&
            grad.size(3) == w_o.size(2) && w_o.scalar_type() == dz.scalar_type() &&
            grad.scalar_type() == dz.scalar_type(),
        "edge_heads_: expected dz [B, P, H, d_head], w_o [H, d_head, d] and grad [B, P, R, d] of "
        "one dtype");
  check_scores(dz, grad.size(2), weights, prefix, out);
  MIK_DISPATCH_FLOATING(dz, [&] {
    const PairScores<accumulator_t<scalar_t>> scores(out, weights, prefix, false);
    const auto blocks = blocks_of(dz.size(2), grad.size(2), kHeads, kPairCols, scores.limits());
    parallel(static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      EdgeHeads<scalar_t> heads(dz, w_o, grad);
      std::vector<double> sums;
      for (int64_t i = begin; i < end; ++i)
        scores.add(blocks[i], dz.size(0), sums, [&](int64_t s) {
          heads.add(blocks[i], s, scores.limits(blocks[i]), sums.data());
        });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) { m.impl("edge_heads_", TORCH_BOX(&edge_heads)); }

}  // namespace
}  // namespace mik
