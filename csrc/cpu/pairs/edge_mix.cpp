// SPDX-License-Identifier: Apache-2.0
// edge_mix: y[b, p, r] = base[b, p, r] + sum_w mask[w, r] delta[b, p, w].
#include "common.h"
#include "cpu/pairs/weighted_rows.h"

namespace mik {
namespace {

// columns of one task: enough tasks where there are few positions
constexpr int64_t kTaskCols = 8 * kSumCols;

// the mask in tiles: [R / kSumRows][W][kSumRows], zeros beyond R
template <class T>
std::vector<accumulator_t<T>> in_tiles(const Tensor& mask) {
  const int64_t writers = mask.size(0), readers = mask.size(1);
  const int64_t tiles = (readers + kSumRows - 1) / kSumRows;
  std::vector<accumulator_t<T>> packed(tiles * writers * kSumRows);
  for (int64_t w = 0; w < writers; ++w)
    for (int64_t r = 0; r < readers; ++r)
      packed[(r / kSumRows * writers + w) * kSumRows + r % kSumRows] =
          static_cast<accumulator_t<T>>(data<T>(mask)[w * mask.stride(0) + r * mask.stride(1)]);
  return packed;
}

template <class T>
void mix(const OptionalTensor& base, const Tensor& delta, const Tensor& mask, const Tensor& out) {
  using A = accumulator_t<T>;
  const int64_t positions = delta.size(1), writers = delta.size(2), d = delta.size(3);
  const int64_t readers = mask.size(1), parts = (d + kTaskCols - 1) / kTaskCols;
  const std::vector<A> masks = in_tiles<T>(mask);
  parallel(delta.size(0) * positions * parts, 1, [&](int64_t begin, int64_t end) {
    Columns<T> columns;
    A sums[kSumRows * kSumCols];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t place = task / parts, b = place / positions, p = place % positions;
      const Rows<T> rows{data<T>(delta) + b * delta.stride(0) + p * delta.stride(1),
                         delta.stride(2), delta.stride(3)};
      const int64_t last = std::min(d, (task % parts + 1) * kTaskCols);
      for (int64_t first = task % parts * kTaskCols; first < last; first += kSumCols) {
        const int64_t cols = std::min<int64_t>(kSumCols, last - first);
        columns.take(rows, writers, first, cols, 1);
        for (int64_t r0 = 0; r0 < readers; r0 += kSumRows) {
          weighted_rows(masks.data() + r0 * writers, columns.panel(0), columns.ld, writers, sums,
                        kSumCols);
          for (int64_t r = r0; r < std::min<int64_t>(readers, r0 + kSumRows); ++r) {
            const A* sum = sums + (r - r0) * kSumCols;
            T* to = mutable_data<T>(out) + (place * readers + r) * d + first;
            if (!base.has_value()) {
              for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<T>(sum[c]);
              continue;
            }
            const int64_t inner = base->stride(3);
            const T* from = data<T>(*base) + b * base->stride(0) + p * base->stride(1) +
                            (base->size(2) == 1 ? 0 : r * base->stride(2)) + first * inner;
            for (int64_t c = 0; c < cols; ++c)
              to[c] = static_cast<T>(sum[c] + static_cast<A>(from[c * inner]));
          }
        }
      }
    }
  });
}

Tensor edge_mix(OptionalTensor base, Tensor delta, Tensor mask) {
  check(delta.dim() == 4 && mask.dim() == 2 && mask.size(0) == delta.size(2) &&
            mask.scalar_type() == delta.scalar_type(),
        "edge_mix: expected delta [B, P, W, d] and mask [W, R] of one dtype");
  const int64_t batch = delta.size(0), positions = delta.size(1), d = delta.size(3);
  check(!base.has_value() ||
            (base->dim() == 4 && base->size(0) == batch && base->size(1) == positions &&
             (base->size(2) == 1 || base->size(2) == mask.size(1)) && base->size(3) == d &&
             base->scalar_type() == delta.scalar_type()),
        "edge_mix: base must be [B, P, R, d] or [B, P, 1, d] in the dtype of delta");
  Tensor out = empty(delta, {batch, positions, mask.size(1), d});
  MIK_DISPATCH_FLOATING(delta, [&] { mix<scalar_t>(base, delta, mask, out); });
  return out;
}

MIK_REGISTER(CPU, m) { m.impl("edge_mix", TORCH_BOX(&edge_mix)); }

}  // namespace
}  // namespace mik
