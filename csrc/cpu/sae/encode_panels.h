// SPDX-License-Identifier: Apache-2.0
// The operands of an encoder, packed for the screen: tokens in tiles, features in panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common.h"
#include "cpu/sae/encode.h"
#include "cpu/simd/scalar.h"
#include "cpu/screen/screen.h"

namespace mik {

constexpr int64_t kPanelBytes = 16 << 20;
// below this packing the weights costs more than it saves
constexpr int64_t kDirectTokens = 8, kDirectScores = 1 << 22;

// what the operators share: dense rows of x, the rest contiguous or as it lies
inline Tensor check_encoder(const char* op, const Tensor& x, const Tensor& w, OptionalTensor& b_enc,
                            OptionalTensor& b_dec, OptionalTensor& scale) {
  const std::string name(op);
  if (x.dim() != 2 || w.dim() != 2 || x.size(1) != w.size(1) || x.scalar_type() != w.scalar_type())
    throw std::runtime_error(name + ": expected x [N, d] and w_enc [F, d] of one dtype");
  if (w.size(0) >= INT32_MAX) throw std::runtime_error(name + ": at most 2^31 - 2 features");
  const int64_t sizes[] = {w.size(0), x.size(1), w.size(0)};
  int at = 0;
  for (OptionalTensor* term : {&b_enc, &b_dec, &scale}) {
    if (term->has_value()) {
      if ((*term)->dim() != 1 || (*term)->size(0) != sizes[at] ||
          (*term)->scalar_type() != x.scalar_type())
        throw std::runtime_error(
            name + ": b_enc [F], b_dec [d] and scale [F] must have the dtype of x");
      *term = torch::stable::contiguous(**term);
    }
    ++at;
  }
  return dense_rows(x);
}

template <class T>
class EncodePanels {
 public:
  // tokens first..first + count of x
  EncodePanels(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
               const OptionalTensor& b_enc, const OptionalTensor& b_dec,
               const OptionalTensor& scale)
      : tokens_(count),
        features_(w.size(0)),
        d_(w.size(1)),
        transposed_(w.stride(1) != 1 && d_ > 1),
        x_(data<T>(x) + first * x.stride(0)),
        ldx_(x.stride(0)),
        w_(w),
        padded_(std::max(round_up(d_, kDimPadding), kDimPadding)),
        b_enc_(data_or_null<T>(b_enc)),
        b_dec_(data_or_null<T>(b_dec)),
        scale_(data_or_null<T>(scale)) {}

 protected:
  struct Exact {
    float score, value;
  };

  const int64_t tokens_, features_, d_;
  // strided rows of w are copied a panel at a time: exact() then serves the panel at hand only
  const bool transposed_;
  std::unique_ptr<float[]> tau_;
  // [F], where the bound is a feature's
  const float* floor_ = nullptr;

  // whether every score is computed exactly
  bool is_direct() const {
    return tokens_ <= kDirectTokens && !transposed_ && tokens_ * features_ <= kDirectScores;
  }

  // x[n] - b_dec, rounded to fp32 once: from here on these numbers are exact
  template <class Out>
  void centred(int64_t n, Out* out) const {
    const T* row = x_ + n * ldx_;
    for (int64_t i = 0; i < d_; ++i) {
      const float value = static_cast<float>(row[i]);
      out[i] = b_dec_ == nullptr ? value : value - static_cast<float>(b_dec_[i]);
    }
  }

  // h of one feature, and what it is ordered by: an fp64 sum rounded once, times the rank
  Exact exact(const double* x, int64_t f) const {
    const double dot =
        transposed_ ? exact_dot(x, panel_copy_.get() + (f - first_) * d_, d_)
                    : exact_dot(x, data<T>(w_) + f * w_.stride(0), d_);
    const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[f]);
    const float h = static_cast<float>(dot + bias);
    return {scale_ == nullptr ? h : h * static_cast<float>(scale_[f]), h};
  }

  // h of `count` features of one token, as the above has them
  void exact(const double* x, const int32_t* features, int64_t count, float* h) const {
    const auto all = [&](auto row_of) {
      constexpr int64_t some = 16;
      decltype(row_of(0)) rows[some];
      double dots[some];
      for (int64_t begin = 0; begin < count; begin += some) {
        const int64_t now = std::min(some, count - begin);
        for (int64_t i = 0; i < now; ++i) rows[i] = row_of(features[begin + i]);
        exact_dots(x, rows, now, d_, dots);
        for (int64_t i = 0; i < now; ++i) {
          const int32_t f = features[begin + i];
          const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[f]);
          h[begin + i] = static_cast<float>(dots[i] + bias);
        }
      }
    };
    if (transposed_)
      all([&](int64_t f) -> const float* { return panel_copy_.get() + (f - first_) * d_; });
    else
      all([&](int64_t f) -> const T* { return data<T>(w_) + f * w_.stride(0); });
  }

  // f(panel, tokens, begin, end, block) for each panel and each thread's token tiles begin..end, of
  // which a block of `block` stays in cache; done() after each panel
  template <class F, class Done>
  void each_panel(const F& f, const Done& done) {
    pack_tokens();
    const int64_t by_memory = kPanelBytes / (2 * padded_) / kRowPadding * kRowPadding;
    const int64_t rows =
        std::min(std::max(by_memory, kRowPadding), round_up(features_, kRowPadding));
    panel_.reset(new uint16_t[rows * padded_]);
    terms_.reset(new float[6 * rows]);
    if (transposed_) panel_copy_.reset(new float[rows * d_]);
    const Tokens tokens{
        tiles_.get(), kTileTokens * padded_, padded_ / 2, tokens_, sx_.get(), ex_.get(), nx_.get(),
        tau_.get()};
    const int64_t block = tiles_in_cache(padded_);
    for (first_ = 0; first_ < features_; first_ += rows) {
      const int64_t count = std::min(rows, features_ - first_);
      pack_panel(count, rows);
      const float* t = terms_.get();
      const Panel panel{panel_.get(), padded_,      count,        first_,       t,
                        t + rows,     t + 2 * rows, t + 3 * rows, t + 4 * rows, t + 5 * rows,
                        floor_ == nullptr ? nullptr : floor_ + first_};
      parallel(token_slots_ / kTokenPadding, 1, [&](int64_t begin, int64_t end) {
        // the units of the split are two tiles, so that every level's token block fits
        f(panel, tokens, 2 * begin, 2 * end, block);
      });
      done();
    }
  }

 private:
  const T* x_;
  const int64_t ldx_;
  const Tensor& w_;
  const int64_t padded_;
  const T *b_enc_, *b_dec_, *scale_;
  int64_t first_ = 0, token_slots_ = 0;
  std::unique_ptr<uint16_t[]> tiles_, panel_;
  std::unique_ptr<float[]> sx_, ex_, nx_, terms_, panel_copy_;

  void pack_tokens() {
    token_slots_ = round_up(tokens_, kTokenPadding);
    tiles_.reset(new uint16_t[token_slots_ * padded_]());
    for (auto* terms : {&sx_, &ex_, &nx_, &tau_}) terms->reset(new float[token_slots_]());
    parallel(tokens_, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> row(d_);
      std::vector<uint16_t> quantised(padded_);
      for (int64_t n = begin; n < end; ++n) {
        centred(n, row.data());
        const auto [scale, norm, error] = quantise(row.data(), d_, quantised.data(), padded_);
        sx_[n] = static_cast<float>(scale);
        ex_[n] = static_cast<float>(error * kUp);
        nx_[n] = static_cast<float>((norm + error) * kUp);
        tau_[n] = -kInfinity;
        into_tile(quantised.data(), padded_, n, tiles_.get());
      }
    });
  }

  // fp32 copies of features first_ + begin..end, 16 strided columns at a time: a cache line a read
  void copy_transposed(int64_t begin, int64_t end) {
    const T* w = data<T>(w_);
    const int64_t row_stride = w_.stride(0), column_stride = w_.stride(1);
    for (int64_t f = begin; f < end; f += 16) {
      const int64_t count = std::min<int64_t>(16, end - f);
      for (int64_t i = 0; i < d_; ++i)
        for (int64_t j = 0; j < count; ++j)
          panel_copy_[(f + j) * d_ + i] =
              static_cast<float>(w[(first_ + f + j) * row_stride + i * column_stride]);
    }
  }

  void pack_panel(int64_t count, int64_t rows) {
    float* terms = terms_.get();
    const double accumulation = screen_rounding(padded_);
    parallel(round_up(count, 16) / 16, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> row(d_);
      end = std::min(end * 16, count);
      begin *= 16;
      if (transposed_) copy_transposed(begin, end);
      for (int64_t f = begin; f < end; ++f) {
        const int64_t feature = first_ + f;
        const float* source = row.data();
        if (transposed_) {
          source = panel_copy_.get() + f * d_;
        } else if constexpr (std::is_same_v<T, float>) {
          source = data<T>(w_) + feature * w_.stride(0);
        } else {
          const T* from = data<T>(w_) + feature * w_.stride(0);
          for (int64_t i = 0; i < d_; ++i) row[i] = static_cast<float>(from[i]);
        }
        const QuantisedRow q = quantise(source, d_, panel_.get() + f * padded_, padded_);
        const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[feature]);
        const double rank = scale_ == nullptr ? 1. : static_cast<float>(scale_[feature]);
        const double weight = std::fabs(rank) * kUp;
        terms[f] = static_cast<float>(q.scale);
        terms[rows + f] = static_cast<float>(bias);
        terms[2 * rows + f] = static_cast<float>(rank);
        terms[3 * rows + f] = static_cast<float>(weight * q.norm);
        terms[4 * rows + f] = static_cast<float>(
            weight * (q.error + (q.norm + q.error) * (kEvaluation + accumulation)));
        // a rank near fp32's limits is not screened either
        const bool safe = weight >= kSmallestNorm && weight <= kLargestNorm;
        terms[5 * rows + f] =
            safe ? static_cast<float>(weight * kEvaluation * std::fabs(bias)) : kInfinity;
      }
    });
    std::fill(panel_.get() + count * padded_,
              panel_.get() + std::min(rows, round_up(count, kRowPadding)) * padded_, 0);
  }
};

}  // namespace mik
