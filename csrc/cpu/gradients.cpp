// SPDX-License-Identifier: Apache-2.0
// by_feature, gather_dot, feature_sum, sae_gradients_: see mikernels/ops/gradients.py.
#include "common.h"
#include "cpu/indices.h"
#include "cpu/levels.h"
#include "cpu/scalar.h"

#include <algorithm>

#define MIK_BODY "cpu/gradients_body.h"
#include "cpu/each_level.h"

namespace mik {
namespace {

std::tuple<Tensor, Tensor> by_feature(Tensor indices, int64_t n_features) {
  check(indices.dim() == 1, "by_feature: indices must be flat");
  indices = torch::stable::contiguous(indices);
  const int64_t count = indices.numel();
  check(n_features >= 0, "by_feature: n_features must be at least 0");
  check_indices("by_feature", indices, count, n_features);
  Tensor offsets = empty(indices, {n_features + 1}), order = empty(indices, {count});
  int64_t *offset = mutable_data<int64_t>(offsets), *slot = mutable_data<int64_t>(order);
  const int64_t* feature = data<int64_t>(indices);
  // counts are shifted by two, so that after the scatter offset[f + 1] has moved to its end
  std::unique_ptr<int64_t[]> next(new int64_t[n_features + 1]());
  for (int64_t i = 0; i < count; ++i) ++next[feature[i] + 1];
  for (int64_t f = 0; f < n_features; ++f) next[f + 1] += next[f];
  std::memcpy(offset, next.get(), (n_features + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) slot[next[feature[i]]++] = i;
  return {offsets, order};
}

Tensor gather_dot(Tensor rows, Tensor w, Tensor indices) {
  check(rows.dim() == 2 && w.dim() == 2 && indices.dim() == 2, "gather_dot: expected 2-D tensors");
  check(rows.scalar_type() == w.scalar_type() && rows.size(1) == w.size(1) &&
            rows.size(0) == indices.size(0),
        "gather_dot: expected rows [N, d], w [F, d] of one dtype and indices [N, k]");
  rows = dense_rows(rows);
  w = dense_rows(w);
  indices = torch::stable::contiguous(indices);
  const int64_t n = rows.size(0), d = rows.size(1), k = indices.size(1);
  check_indices("gather_dot", indices, n * k, w.size(0));
  Tensor out = empty(rows, {n, k});
  MIK_DISPATCH_FLOATING(rows, [&] {
    using A = accumulator_t<scalar_t>;
    parallel(n, 16, [&](int64_t begin, int64_t end) {
      MIK_AT_LEVEL(dot_tokens<scalar_t, A>)(begin, end, k, d, data<scalar_t>(rows), rows.stride(0),
                                            data<scalar_t>(w), w.stride(0), data<int64_t>(indices),
                                            mutable_data<scalar_t>(out));
    });
  });
  return out;
}

void check_slots(const char* op, const Tensor& offsets, const Tensor& order, int64_t slots) {
  check(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
            offsets.is_contiguous() && order.is_contiguous() && order.dim() == 1 &&
            order.numel() == slots,
        "expected offsets [F + 1] and order [N k] as by_feature returns them");
  const int64_t *offset = data<int64_t>(offsets), n_features = offsets.size(0) - 1;
  bool ascending = n_features >= 0 && offset[0] == 0 && offset[n_features] == slots;
  for (int64_t f = 0; f < n_features; ++f) ascending &= offset[f] <= offset[f + 1];
  check(ascending, "offsets must ascend from 0 to N k, as by_feature returns them");
  check_indices(op, order, slots, slots);
}

// f(begin, end) over feature ranges of about equal work (slots plus one for the row that is
// written), so that hot features do not leave one thread behind; a feature is never split, so sums
// stay ordered
template <class F>
void parallel_features(const Tensor& offsets, const F& f) {
  const int64_t* offset = data<int64_t>(offsets);
  const int64_t n_features = offsets.size(0) - 1;
  const int64_t work = offset[n_features] + n_features;
  const int64_t pieces = std::min<int64_t>(n_features, 64);
  const auto boundary = [&](int64_t piece) {
    const int64_t target = work * piece / pieces;
    int64_t low = 0, high = n_features;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offset[middle] + middle < target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    f(begin == 0 ? 0 : boundary(begin), end == pieces ? n_features : boundary(end));
  });
}

std::tuple<Tensor, Tensor> feature_sum(Tensor coefficients, Tensor rows, Tensor offsets,
                                       Tensor order) {
  check(coefficients.dim() == 2 && rows.dim() == 2 && coefficients.size(0) == rows.size(0) &&
            coefficients.scalar_type() == rows.scalar_type(),
        "feature_sum: expected coefficients [N, k] and rows [N, d] of one dtype");
  coefficients = torch::stable::contiguous(coefficients);
  rows = dense_rows(rows);
  offsets = torch::stable::contiguous(offsets);
  order = torch::stable::contiguous(order);
  const int64_t k = coefficients.size(1), d = rows.size(1), n_features = offsets.size(0) - 1;
  check_slots("feature_sum", offsets, order, coefficients.numel());
  Tensor dw = empty(rows, {n_features, d}), db = empty(rows, {n_features});
  MIK_DISPATCH_FLOATING(rows, [&] {
    using A = accumulator_t<scalar_t>;
    parallel_features(offsets, [&](int64_t begin, int64_t end) {
      int64_t hottest = 0;
      const int64_t* offset = data<int64_t>(offsets);
      for (int64_t f = begin; f < end; ++f) hottest = std::max(hottest, offset[f + 1] - offset[f]);
      std::unique_ptr<A[]> sum(new A[d]), weights(new A[hottest + 1]);
      std::unique_ptr<const scalar_t*[]> pointers(new const scalar_t*[hottest + 1]);
      MIK_AT_LEVEL(sum_features<scalar_t, A>)(
          begin, end, k, d, data<scalar_t>(coefficients), data<scalar_t>(rows), rows.stride(0),
          offset, data<int64_t>(order), mutable_data<scalar_t>(dw), mutable_data<scalar_t>(db),
          sum.get(), pointers.get(), weights.get());
    });
  });
  return {dw, db};
}

void sae_gradients(Tensor values, Tensor indices, Tensor offsets, Tensor order, Tensor dy, Tensor x,
                   Tensor w_dec, Tensor dw_dec, Tensor dw_enc, Tensor db_enc, bool accumulate) {
  check(values.dim() == 2 && dy.dim() == 2 && x.dim() == 2 && w_dec.dim() == 2 &&
            dy.size(0) == values.size(0) && x.size(0) == values.size(0) &&
            dy.size(1) == w_dec.size(1) && x.size(1) == w_dec.size(1) &&
            values.scalar_type() == dy.scalar_type() && x.scalar_type() == dy.scalar_type(),
        "sae_gradients_: expected values [N, k], dy and x [N, d] of one dtype, w_dec [F, d]");
  check(indices.dim() == 2 && indices.size(0) == values.size(0) &&
            indices.size(1) == values.size(1) && indices.scalar_type() == ScalarType::Long,
        "sae_gradients_: indices must be [N, k] int64");
  const int64_t k = values.size(1), d = w_dec.size(1), n_features = w_dec.size(0);
  for (const Tensor* out : {&dw_dec, &dw_enc, &db_enc})
    check(out->is_contiguous() && out->scalar_type() == ScalarType::Float &&
              out->dim() == (out == &db_enc ? 1 : 2) && out->size(0) == n_features &&
              (out == &db_enc || out->size(1) == d),
          "sae_gradients_: dw_dec, dw_enc [F, d] and db_enc [F] must be contiguous float32");
  values = torch::stable::contiguous(values);
  offsets = torch::stable::contiguous(offsets);
  order = torch::stable::contiguous(order);
  dy = dense_rows(dy);
  x = dense_rows(x);
  w_dec = dense_rows(w_dec);
  check(offsets.numel() == n_features + 1, "sae_gradients_: offsets must be [F + 1]");
  check_slots("sae_gradients_", offsets, order, values.numel());
  const auto run = [&]<class T, class W>(T*, W*) {
    parallel_features(offsets, [&](int64_t begin, int64_t end) {
      MIK_AT_LEVEL(sae_features<T, W>)(begin, end, k, d, data<T>(values), data<T>(dy), dy.stride(0),
                                       data<T>(x), x.stride(0), data<W>(w_dec), w_dec.stride(0),
                                       data<int64_t>(offsets), data<int64_t>(order),
                                       mutable_data<float>(dw_dec), mutable_data<float>(dw_enc),
                                       mutable_data<float>(db_enc), accumulate);
    });
  };
  MIK_DISPATCH_FLOATING(dy, [&] {
    if (w_dec.scalar_type() == dy.scalar_type()) {
      run(static_cast<scalar_t*>(nullptr), static_cast<scalar_t*>(nullptr));
    } else {
      check(w_dec.scalar_type() == ScalarType::BFloat16,
            "sae_gradients_: w_dec must have the dtype of dy, or bfloat16");
      run(static_cast<scalar_t*>(nullptr), static_cast<torch::headeronly::BFloat16*>(nullptr));
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) {
  m.impl("by_feature", TORCH_BOX(&by_feature));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("feature_sum", TORCH_BOX(&feature_sum));
  m.impl("sae_gradients_", TORCH_BOX(&sae_gradients));
}

}  // namespace
}  // namespace mik
