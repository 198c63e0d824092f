// SPDX-License-Identifier: Apache-2.0
// by_feature, gather_dot, feature_sum, sae_gradients_: see mikernels/ops/sae/gradients.py.
#include "common.h"
#include "cpu/sae/gradients.h"
#include "cpu/sae/indices.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"
#include "cpu/sae/slots.h"

#define MIK_BODY "cpu/sae/gradients_body.h"
#include "cpu/simd/each_level.h"

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
  // next[f + 1] counts feature f and then, summed, is where feature f + 1 begins
  std::unique_ptr<int64_t[]> next(new int64_t[n_features + 1]());
  for (int64_t i = 0; i < count; ++i) ++next[feature[i] + 1];
  for (int64_t f = 0; f < n_features; ++f) next[f + 1] += next[f];
  std::memcpy(offset, next.get(), (n_features + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) slot[next[feature[i]]++] = i;
  return {offsets, order};
}

// levels of the features of w, made contiguous, for rows [L, N, d]; without them rows are [N, d]
void check_levels(const char* op, const Tensor& rows, OptionalTensor& levels, int64_t features) {
  const std::string name(op);
  if (rows.dim() != (levels.has_value() ? 3 : 2))
    throw std::runtime_error(name + ": expected rows [N, d], or [L, N, d] with levels [F]");
  if (!levels.has_value()) return;
  if (levels->dim() != 1 || levels->size(0) != features)
    throw std::runtime_error(name + ": levels must be [F], one for each feature");
  levels = torch::stable::contiguous(*levels);
  check_indices(op, *levels, features, rows.size(0), "levels");
}

Tensor gather_dot(Tensor rows, Tensor w, Tensor indices, OptionalTensor row_offsets,
                  OptionalTensor levels) {
  check(w.dim() == 2, "gather_dot: w must be 2-D");
  check_levels("gather_dot", rows, levels, w.size(0));
  check_rows("gather_dot", indices, row_offsets);
  const int64_t axis = rows.dim() - 2, n = rows.size(axis), d = rows.size(axis + 1);
  const int64_t slots = indices.numel();
  check(rows.scalar_type() == w.scalar_type() && w.size(1) == d &&
            n == (row_offsets.has_value() ? row_offsets->size(0) - 1 : indices.size(0)),
        "gather_dot: expected rows [N, d] and w [F, d] of one dtype, N tokens of slots");
  rows = dense_rows(rows);
  w = dense_rows(w);
  check_indices("gather_dot", indices, slots, w.size(0));
  Tensor out = row_offsets.has_value() ? empty(rows, {slots}) : empty(rows, {n, indices.size(1)});
  MIK_DISPATCH_FLOATING(rows, [&] {
    using A = accumulator_t<scalar_t>;
    const auto run = [&](auto level) {
      parallel_rows(n, indices.size(-1), slots, row_offsets,
                    [&](auto owned, int64_t begin, int64_t end) {
                      MIK_AT_LEVEL(dot_tokens<scalar_t, A, decltype(owned), decltype(level)>)(
                          begin, end, owned, level, d, data<scalar_t>(rows), rows.stride(axis),
                          data<scalar_t>(w), w.stride(0), data<int64_t>(indices),
                          mutable_data<scalar_t>(out));
                    });
    };
    if (levels.has_value())
      run(GivenLevels{data<int64_t>(*levels), rows.stride(0)});
    else
      run(OneLevel{});
  });
  return out;
}

void check_slots(const char* op, const Tensor& offsets, const Tensor& order, int64_t slots) {
  check(offsets.dim() == 1 && offsets.size(0) >= 1 && order.dim() == 1 && order.numel() == slots,
        "expected offsets [F + 1] and order [N k] as by_feature returns them");
  check_bounds(op, offsets, offsets.size(0) - 1, slots, true);
  check_indices(op, order, slots, slots);
}

// f(token_of) with the form that the slots have
template <class F>
void with_tokens(const Tensor& values, const OptionalTensor& tokens, const F& f) {
  if (tokens.has_value())
    f(GivenTokens{data<int64_t>(*tokens)});
  else
    f(EqualTokens{values.size(1)});
}

std::tuple<Tensor, Tensor> feature_sum(Tensor coefficients, Tensor rows, Tensor offsets,
                                       Tensor order, OptionalTensor tokens) {
  check(rows.dim() == 2 && coefficients.scalar_type() == rows.scalar_type(),
        "feature_sum: expected coefficients and rows [N, d] of one dtype");
  check_tokens("feature_sum", coefficients, tokens, rows.size(0));
  check(tokens.has_value() || coefficients.size(0) == rows.size(0),
        "feature_sum: coefficients must be [N, k]");
  coefficients = torch::stable::contiguous(coefficients);
  rows = dense_rows(rows);
  offsets = torch::stable::contiguous(offsets);
  order = torch::stable::contiguous(order);
  check_slots("feature_sum", offsets, order, coefficients.numel());
  const int64_t d = rows.size(1), n_features = offsets.size(0) - 1;
  Tensor dw = empty(rows, {n_features, d}), db = empty(rows, {n_features});
  MIK_DISPATCH_FLOATING(rows, [&] {
    using A = accumulator_t<scalar_t>;
    with_tokens(coefficients, tokens, [&](auto token) {
      const int64_t* offset = data<int64_t>(offsets);
      parallel_owners(offset, n_features, [&](int64_t begin, int64_t end) {
        int64_t hottest = 0;
        for (int64_t f = begin; f < end; ++f)
          hottest = std::max(hottest, offset[f + 1] - offset[f]);
        std::unique_ptr<A[]> sum(new A[d]), weights(new A[hottest + 1]);
        std::unique_ptr<const scalar_t*[]> pointers(new const scalar_t*[hottest + 1]);
        MIK_AT_LEVEL(sum_features<scalar_t, A, decltype(token)>)(
            begin, end, token, d, data<scalar_t>(coefficients), data<scalar_t>(rows),
            rows.stride(0), offset, data<int64_t>(order), mutable_data<scalar_t>(dw),
            mutable_data<scalar_t>(db), sum.get(), pointers.get(), weights.get());
      });
    });
  });
  return {dw, db};
}

void sae_gradients(Tensor values, Tensor indices, Tensor offsets, Tensor order,
                   OptionalTensor tokens, Tensor dy, Tensor x, Tensor w_dec, OptionalTensor levels,
                   OptionalTensor d_pre, Tensor dw_dec, Tensor dw_enc, Tensor db_enc,
                   bool accumulate) {
  check(x.dim() == 2 && w_dec.dim() == 2, "sae_gradients_: x and w_dec must be 2-D");
  const int64_t d_out = w_dec.size(1), d_in = x.size(1), n_features = w_dec.size(0);
  check_levels("sae_gradients_", dy, levels, n_features);
  const int64_t axis = dy.dim() - 2, n = dy.size(axis);
  check(x.size(0) == n && dy.size(axis + 1) == d_out && values.scalar_type() == dy.scalar_type() &&
            x.scalar_type() == dy.scalar_type(),
        "sae_gradients_: expected values, dy [N, d_out] and x [N, d_in] of one dtype, w_dec "
        "[F, d_out]");
  check_tokens("sae_gradients_", values, tokens, n);
  check(tokens.has_value() || values.size(0) == n, "sae_gradients_: values must be [N, k]");
  const auto of_values = [&](const Tensor& t, ScalarType dtype) {
    return t.dim() == values.dim() && t.size(0) == values.size(0) &&
           t.size(-1) == values.size(-1) && t.scalar_type() == dtype;
  };
  check(of_values(indices, ScalarType::Long),
        "sae_gradients_: indices must be int64 of the shape of values");
  check(!d_pre.has_value() || of_values(*d_pre, values.scalar_type()),
        "sae_gradients_: d_pre must have the shape and dtype of values");
  for (const Tensor* out : {&dw_dec, &dw_enc, &db_enc})
    check(out->is_contiguous() && out->scalar_type() == ScalarType::Float &&
              out->dim() == (out == &db_enc ? 1 : 2) && out->size(0) == n_features &&
              (out == &db_enc || out->size(1) == (out == &dw_dec ? d_out : d_in)),
          "sae_gradients_: dw_dec [F, d_out], dw_enc [F, d_in] and db_enc [F] must be contiguous "
          "float32");
  values = torch::stable::contiguous(values);
  offsets = torch::stable::contiguous(offsets);
  order = torch::stable::contiguous(order);
  dy = dense_rows(dy);
  x = dense_rows(x);
  if (d_pre.has_value())
    d_pre = torch::stable::contiguous(*d_pre);
  else
    w_dec = dense_rows(w_dec);
  check(offsets.numel() == n_features + 1, "sae_gradients_: offsets must be [F + 1]");
  const ScalarType w_type = w_dec.scalar_type();
  // a decoder that is not read may be of any floating dtype
  const bool unread =
      d_pre.has_value() && (w_type == ScalarType::Float || w_type == ScalarType::Double ||
                            w_type == ScalarType::BFloat16 || w_type == ScalarType::Half);
  check_slots("sae_gradients_", offsets, order, values.numel());
  const auto run = [&]<class T, class W>(T*, W*) {
    SaeGradients<T, W> g{};
    g.d_out = d_out, g.d_in = d_in;
    g.values = data<T>(values), g.d_pre = data_or_null<T>(d_pre);
    g.dy = data<T>(dy), g.dy_row = dy.stride(axis), g.dy_level = dy.stride(0);
    g.x = data<T>(x), g.x_row = x.stride(0);
    g.w_dec = data<W>(w_dec), g.w_row = w_dec.stride(0);
    g.levels = data_or_null<int64_t>(levels);
    g.offsets = data<int64_t>(offsets), g.order = data<int64_t>(order);
    g.dw_dec = mutable_data<float>(dw_dec), g.dw_enc = mutable_data<float>(dw_enc);
    g.db_enc = mutable_data<float>(db_enc);
    g.accumulate = accumulate;
    with_tokens(values, tokens, [&](auto token) {
      parallel_owners(g.offsets, n_features, [&](int64_t begin, int64_t end) {
        if (g.d_pre != nullptr)
          MIK_AT_LEVEL(sae_features<true, T, W, decltype(token)>)(begin, end, token, g);
        else
          MIK_AT_LEVEL(sae_features<false, T, W, decltype(token)>)(begin, end, token, g);
      });
    });
  };
  MIK_DISPATCH_FLOATING(dy, [&] {
    if (unread || w_type == dy.scalar_type()) {
      run(static_cast<scalar_t*>(nullptr), static_cast<scalar_t*>(nullptr));
    } else {
      check(w_type == ScalarType::BFloat16,
            "sae_gradients_: w_dec must have the dtype of dy, or bfloat16");
      run(static_cast<scalar_t*>(nullptr), static_cast<torch::headeronly::BFloat16*>(nullptr));
    }
  });
}

MIK_REGISTER(CPU, m) {
  m.impl("by_feature", TORCH_BOX(&by_feature));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("feature_sum", TORCH_BOX(&feature_sum));
  m.impl("sae_gradients_", TORCH_BOX(&sae_gradients));
}

}  // namespace
}  // namespace mik
