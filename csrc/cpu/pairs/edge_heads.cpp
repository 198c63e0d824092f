// SPDX-License-Identifier: Apache-2.0
// edge_heads_: out[q, h, r] += sum_s weights[q, s] sum_p <dz[s, p, h] w_o[h], grad[s, p, r]>.
//
// Some heads' rows are formed for some positions and a chunk of d at a time, so that they stay in
// the second-level cache until they have met the gradients.
#include "common.h"
#include "cpu/pairs/weighted_rows.h"
#include "cpu/pairs/pair_scores.h"

namespace mik {
namespace {

// what is formed at a time: at most 590 KB
constexpr int64_t kHeads = 12, kPositions = 8 * kSumRows, kWidth = 4 * kSumCols;
// heads of one task: all of them meet a chunk of the gradients before the next
constexpr int64_t kTaskHeads = 128;

template <class T>
class EdgeHeads {
 public:
  using A = accumulator_t<T>;

  EdgeHeads(const Tensor& dz, const Tensor& w_o, const Tensor& grad)
      : positions_(dz.size(1)),
        depth_(dz.size(3)),
        d_(w_o.size(2)),
        dz_(strided(dz)),
        w_o_(strided(w_o)),
        grad_(strided(grad)) {}

  // sums[h, r] += the products of a block of heads and readers at positions first..last, counted
  // through all examples. w_o is read once, and the gradients for every kHeads heads: chunk by
  // chunk of d, since a chunk of all positions' stays in a cache
  void add(const Block& block, int64_t first, int64_t last, const int64_t* limits, double* sums) {
    const int64_t parts = (block.rows + kHeads - 1) / kHeads;
    const int64_t most = (block.rows + parts - 1) / parts;
    for (int64_t k = 0; k < d_; k += kWidth)
      for (int64_t h = 0; h < block.rows; h += most) {
        const Block some{block.row + h, std::min(most, block.rows - h), block.col, block.cols};
        for (int64_t p = first; p < last; p += kPositions)
          add(some, p, std::min(kPositions, last - p), k, limits, sums + h * block.cols);
      }
  }

 private:
  // strides of tensors are calls into libtorch: 5 % of the time when they stood in the loops
  struct Strided {
    const T* base;
    int64_t strides[4];

    const T* at(int64_t i, int64_t j, int64_t k, int64_t l = 0) const {
      return base + i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3];
    }
  };

  static Strided strided(const Tensor& of) {
    Strided found{data<T>(of), {0, 0, 0, 0}};
    for (int64_t i = 0; i < of.dim(); ++i) found.strides[i] = of.stride(i);
    return found;
  }

  const int64_t positions_, depth_, d_;
  const Strided dz_, w_o_, grad_;
  Scratch<A> rows_, z_;
  Columns<T> columns_;
  BlockProduct<T> product_;

  // the products of `here` positions from p on and of a chunk of d from k on
  void add(const Block& block, int64_t p, int64_t here, int64_t k, const int64_t* limits,
           double* sums) {
    const int64_t wide = std::min(kWidth, d_ - k), heads = block.rows;
    A* const rows = rows_.take(kPositions * heads * kWidth);
    for (int64_t h = 0; h < heads; ++h)
      form(block.row + h, p, here, k, wide, rows + h * kWidth, heads * kWidth);
    for (int64_t t = 0; t < here; ++t) {
      const Rows<A> formed{rows + (t * heads - block.row) * kWidth, kWidth, 1};
      const Rows<T> grads{grad_.at((p + t) / positions_, (p + t) % positions_, 0, k),
                          grad_.strides[2], grad_.strides[3]};
      product_.add(formed, grads, block, wide, limits, sums);
    }
  }

  // to[t, 0:wide] = dz[position p + t, head] w_o[head, :, k:k + wide]; rows are ld apart, and
  // written by whole tiles
  void form(int64_t head, int64_t p, int64_t here, int64_t k, int64_t wide, A* to, int64_t ld) {
    const int64_t tiles = (here + kSumRows - 1) / kSumRows;
    A* const z = z_.take(tiles * kSumRows * depth_);
    for (int64_t t = 0; t < tiles * kSumRows; ++t) {
      A* const column = z + t / kSumRows * depth_ * kSumRows + t % kSumRows;
      const T* from = dz_.at((p + std::min(t, here - 1)) / positions_,
                             (p + std::min(t, here - 1)) % positions_, head);
      for (int64_t e = 0; e < depth_; ++e)
        column[e * kSumRows] = static_cast<A>(from[e * dz_.strides[3]]);
    }
    const Rows<T> w{w_o_.at(head, 0, 0), w_o_.strides[1], w_o_.strides[2]};
    columns_.take(w, depth_, k, wide, tiles);
    for (int64_t c = 0; c * kSumCols < wide; ++c)
      for (int64_t tile = 0; tile < tiles; ++tile)
        weighted_rows(z + tile * depth_ * kSumRows, columns_.panel(c), columns_.ld, depth_,
                      to + tile * kSumRows * ld + c * kSumCols, ld);
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
    const auto blocks =
        blocks_of(dz.size(2), grad.size(2), kTaskHeads, kPairCols, scores.limits(), 1);
    // examples whose weights are the same are one
    const int64_t examples = scores.weighted() ? dz.size(0) : 1;
    const int64_t each = dz.size(0) * dz.size(1) / std::max<int64_t>(examples, 1);
    share(blocks, [&](const auto& next) {
      EdgeHeads<scalar_t> heads(dz, w_o, grad);
      std::vector<double> sums;
      while (const Block* block = next())
        scores.add(*block, examples, sums, [&](int64_t s) {
          heads.add(*block, s * each, (s + 1) * each, scores.limits(*block), sums.data());
        });
    });
  });
}

MIK_REGISTER(CPU, m) { m.impl("edge_heads_", TORCH_BOX(&edge_heads)); }

}  // namespace
}  // namespace mik
