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
#include "cpu/screen/columns.h"
#include "cpu/screen/screen.h"

namespace mik {

constexpr int64_t kPanelBytes = 16 << 20, kCoarsePanelBytes = 4 << 20;
// fewer tokens do not pay for the weights in 8 bits
constexpr int64_t kCoarseTokens = 256;
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
        throw std::runtime_error(name +
                                 ": b_enc [F], b_dec [d] and scale [F] must have the dtype of x");
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
               const OptionalTensor& scale, bool may_be_coarse = true)
      : tokens_(count),
        features_(w.size(0)),
        d_(w.size(1)),
        transposed_(w.stride(1) != 1 && d_ > 1),
        x_(data<T>(x) + first * x.stride(0)),
        ldx_(x.stride(0)),
        w_(w),
        padded_(std::max(round_up(d_, kDimPadding), kDimPadding)),
        coarse_(may_be_coarse && tokens_ >= kCoarseTokens && has_coarse_screen(padded_)),
        b_enc_(data_or_null<T>(b_enc)),
        b_dec_(data_or_null<T>(b_dec)),
        scale_(data_or_null<T>(scale)) {}

 protected:
  struct Exact {
    float score, value;
  };

  const int64_t tokens_, features_, d_;
  // strided rows of w are copied a panel at a time: exact() is slow for earlier panels
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
    const double dot = !transposed_ ? exact_dot(x, data<T>(w_) + f * w_.stride(0), d_)
                       : f < first_ ? exact_dot(x, copy_weights(f, 1), d_)
                                    : exact_dot(x, panel_copy_.get() + (f - first_) * d_, d_);
    const float h = with_bias(dot, f);
    return {ranked(h, f), h};
  }

  float ranked(float h, int64_t f) const {
    return scale_ == nullptr ? h : h * static_cast<float>(scale_[f]);
  }

  // f(feature, fp32 weights) for features of begin..end, which are read once
  template <class F>
  void each_weights(int64_t begin, int64_t end, const F& f) const {
    constexpr int64_t some = 16;
    for (int64_t first = begin; first < end; first += some) {
      const int64_t count = std::min(some, end - first);
      const float* rows;
      int64_t stride = d_;
      if (std::is_same_v<T, float> && !transposed_) {
        stride = w_.stride(0);
        rows = data<float>(w_) + first * stride;
      } else {
        rows = copy_weights(first, count);
      }
      for (int64_t i = 0; i < count; ++i) f(first + i, rows + i * stride);
    }
  }

  // x[n] - b_dec in fp32; for tokens that each_panel has packed
  const float* activations(int64_t n) const {
    if constexpr (std::is_same_v<T, float>)
      if (b_dec_ == nullptr) return x_ + n * ldx_;
    return centred_.get() + n * d_;
  }

  // h of one feature with `count` tokens, as the above has it
  void exact(const float* weights, int64_t f, const float* const* x, int64_t count,
             float* h) const {
    double dots[16];
    exact_dots(weights, x, count, d_, dots);
    for (int64_t i = 0; i < count; ++i) h[i] = with_bias(dots[i], f);
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
          h[begin + i] = with_bias(dots[i], features[begin + i]);
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
    if (coarse_) balance_columns();
    pack_tokens();
    const int64_t by_memory = (coarse_ ? kCoarsePanelBytes / 3 : kPanelBytes / 2) / padded_;
    const int64_t rows = std::min(std::max(by_memory / kRowPadding * kRowPadding, kRowPadding),
                                  round_up(features_, kRowPadding));
    panel_.reset(new uint16_t[rows * padded_]);
    terms_.reset(new float[(coarse_ ? 8 : 6) * rows]);
    if (coarse_) {
      byte_panel_.reset(new int8_t[rows * padded_]);
      start_.reset(new int32_t[rows]);
    }
    if (transposed_) panel_copy_.reset(new float[rows * d_]);
    const Tokens tokens{.tiles = tiles_.get(),
                        .tile_stride = kTileTokens * padded_,
                        .pairs = padded_ / 2,
                        .count = tokens_,
                        .terms = {sx_.get(), ex_.get(), nx_.get()},
                        .tau = tau_.get(),
                        .byte_tiles = byte_tiles_.get(),
                        .rows = fine_rows_.get(),
                        .byte_terms = {byte_sx_.get(), byte_ex_.get(), byte_nx_.get()},
                        .courses = courses_.empty() ? nullptr : courses_.data()};
    // half as many where the cache has to hold 16-bit rows beside bytes
    const int64_t all = tiles_in_cache(padded_), half = std::max<int64_t>(all / 4 * 2, 2);
    for (first_ = 0; first_ < features_; first_ += rows) {
      const int64_t count = std::min(rows, features_ - first_);
      pack_panel(count, rows);
      const float* t = terms_.get();
      const FeatureTerms terms{t, t + rows, t + 2 * rows, t + 3 * rows, t + 4 * rows, t + 5 * rows};
      FeatureTerms byte_terms = terms;
      if (coarse_) {
        byte_terms.scale = t + 6 * rows;
        byte_terms.q = t + 7 * rows;
      }
      const Panel panel{.rows = panel_.get(),
                        .row_stride = padded_,
                        .count = count,
                        .first_feature = first_,
                        .terms = terms,
                        .floor = floor_ == nullptr ? nullptr : floor_ + first_,
                        .bytes = byte_panel_.get(),
                        .start = start_.get(),
                        .byte_terms = byte_terms};
      parallel(token_slots_ / kTokenPadding, 1, [&](int64_t begin, int64_t end) {
        // the units of the split are two tiles, so that every level's token block fits
        f(panel, tokens, 2 * begin, 2 * end, coarse_ ? half : all);
      });
      done();
    }
  }

 private:
  const T* x_;
  const int64_t ldx_;
  const Tensor& w_;
  const int64_t padded_;
  const bool coarse_;
  const T *b_enc_, *b_dec_, *scale_;
  int64_t first_ = 0, token_slots_ = 0;
  std::unique_ptr<uint16_t[]> tiles_, panel_, fine_rows_;
  std::unique_ptr<uint8_t[]> byte_tiles_;
  std::unique_ptr<int8_t[]> byte_panel_;
  std::unique_ptr<int32_t[]> start_;
  std::unique_ptr<float[]> sx_, ex_, nx_, byte_sx_, byte_ex_, byte_nx_, terms_, panel_copy_,
      centred_;
  std::vector<CoarseCourse> courses_;
  Columns columns_;

  float with_bias(double dot, int64_t f) const {
    return static_cast<float>(dot + (b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[f])));
  }

  float weight(int64_t f, int64_t i) const {
    return static_cast<float>(data<T>(w_)[f * w_.stride(0) + i * w_.stride(1)]);
  }

  void balance_columns() {
    std::vector<double> x_squares(d_), w_squares(d_);
    std::vector<float> row(d_);
    const int64_t tokens = std::min(tokens_, kSampledRows);
    for (int64_t i = 0; i < tokens; ++i) {
      centred(i * (tokens_ / tokens), row.data());
      for (int64_t j = 0; j < d_; ++j)
        x_squares[j] += static_cast<double>(row[j]) * row[j] / static_cast<double>(tokens);
    }
    const int64_t features = std::min(features_, kSampledRows);
    const auto add_feature = [&](int64_t i, int64_t j) {
      const double w = weight(i * (features_ / features), j);
      w_squares[j] += w * w / static_cast<double>(features);
    };
    // along memory
    if (transposed_) {
      for (int64_t j = 0; j < d_; ++j)
        for (int64_t i = 0; i < features; ++i) add_feature(i, j);
    } else {
      for (int64_t i = 0; i < features; ++i)
        for (int64_t j = 0; j < d_; ++j) add_feature(i, j);
    }
    columns_ = balanced(x_squares, w_squares);
  }

  void pack_tokens() {
    token_slots_ = round_up(tokens_, kTokenPadding);
    const int64_t numbers = token_slots_ * padded_;
    // not initialised here, where one thread would clear 16 MB at S1 for all
    tiles_.reset(new uint16_t[numbers]);
    std::vector<std::unique_ptr<float[]>*> terms{&sx_, &ex_, &nx_, &tau_};
    if (coarse_) {
      byte_tiles_.reset(new uint8_t[numbers]);
      fine_rows_.reset(new uint16_t[numbers]);
      terms.insert(terms.end(), {&byte_sx_, &byte_ex_, &byte_nx_});
      courses_.assign(token_slots_ / kTileTokens, CoarseCourse(padded_));
    }
    for (auto* of : terms) of->reset(new float[token_slots_]());
    if (b_dec_ != nullptr || !std::is_same_v<T, float>) centred_.reset(new float[tokens_ * d_]);
    // slots behind the last token are multiplied too, and select nothing
    std::fill(tau_.get() + tokens_, tau_.get() + token_slots_, kInfinity);
    const std::vector<uint16_t> zeros(padded_);
    const std::vector<int8_t> zero_bytes(padded_);
    for (int64_t n = tokens_; n < token_slots_; ++n) {
      into_tile(zeros.data(), padded_, n, tiles_.get());
      if (!coarse_) continue;
      into_byte_tile(zero_bytes.data(), padded_, n, byte_tiles_.get());
      std::copy(zeros.begin(), zeros.end(), fine_rows_.get() + n * padded_);
    }
    parallel(tokens_, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> row(d_), scratch(padded_);
      std::vector<uint16_t> quantised(padded_);
      std::vector<int8_t> bytes(padded_);
      const auto note = [](const QuantisedRow& of, int64_t n, auto& scale, auto& error,
                           auto& norm) {
        scale[n] = static_cast<float>(of.scale);
        error[n] = static_cast<float>(of.error * kUp);
        norm[n] = static_cast<float>((of.norm + of.error) * kUp);
      };
      for (int64_t n = begin; n < end; ++n) {
        centred(n, row.data());
        if (centred_ != nullptr) std::copy_n(row.data(), d_, centred_.get() + n * d_);
        tau_[n] = -kInfinity;
        if (coarse_) {
          uint16_t* fine = fine_rows_.get() + n * padded_;
          const TwiceQuantised both = quantise_twice(row.data(), columns_.x.data(), d_, padded_,
                                                     scratch.data(), bytes.data(), fine);
          note(both.fine, n, sx_, ex_, nx_);
          note(both.coarse, n, byte_sx_, byte_ex_, byte_nx_);
          into_tile(fine, padded_, n, tiles_.get());
          into_byte_tile(bytes.data(), padded_, n, byte_tiles_.get());
        } else {
          note(quantise(row.data(), d_, quantised.data(), padded_), n, sx_, ex_, nx_);
          into_tile(quantised.data(), padded_, n, tiles_.get());
        }
      }
    });
  }

  // fp32 copies of `count` features from `first`, in this thread's memory until the next call
  const float* copy_weights(int64_t first, int64_t count) const {
    static thread_local std::vector<float> copies;
    copies.resize(count * d_);
    copy_weights(first, count, copies.data());
    return copies.data();
  }

  // 16 strided columns at a time: a cache line a read
  void copy_weights(int64_t first, int64_t count, float* out) const {
    const T* w = data<T>(w_);
    const int64_t row_stride = w_.stride(0), column_stride = w_.stride(1);
    for (int64_t f = 0; f < count; f += 16) {
      const int64_t here = std::min<int64_t>(16, count - f);
      for (int64_t i = 0; i < d_; ++i)
        for (int64_t j = 0; j < here; ++j)
          out[(f + j) * d_ + i] =
              static_cast<float>(w[(first + f + j) * row_stride + i * column_stride]);
    }
  }

  void pack_panel(int64_t count, int64_t rows) {
    float* terms = terms_.get();
    const double accumulation = screen_rounding(padded_);
    parallel(round_up(count, 16) / 16, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> row(d_), scratch(padded_);
      end = std::min(end * 16, count);
      begin *= 16;
      if (transposed_) copy_weights(first_ + begin, end - begin, panel_copy_.get() + begin * d_);
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
        const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[feature]);
        const double rank = scale_ == nullptr ? 1. : static_cast<float>(scale_[feature]);
        const double weight = std::fabs(rank) * kUp;
        // q of one width
        const auto share = [&](const QuantisedRow& of) {
          return static_cast<float>(
              weight * (of.error + (of.norm + of.error) * (kEvaluation + accumulation)));
        };
        QuantisedRow q;
        if (coarse_) {
          const TwiceQuantised both =
              quantise_twice(source, columns_.w.data(), d_, padded_, scratch.data(),
                             byte_panel_.get() + f * padded_, panel_.get() + f * padded_);
          q = both.fine;
          // tokens are stored 128 too large
          start_[f] = -128 * both.sum;
          terms[6 * rows + f] = static_cast<float>(both.coarse.scale);
          terms[7 * rows + f] = share(both.coarse);
        } else {
          q = quantise(source, d_, panel_.get() + f * padded_, padded_);
        }
        terms[f] = static_cast<float>(q.scale);
        terms[rows + f] = static_cast<float>(bias);
        terms[2 * rows + f] = static_cast<float>(rank);
        terms[3 * rows + f] = static_cast<float>(weight * q.norm);
        terms[4 * rows + f] = share(q);
        // a rank near fp32's limits is not screened either
        const bool safe = weight >= kSmallestNorm && weight <= kLargestNorm;
        terms[5 * rows + f] =
            safe ? static_cast<float>(weight * kEvaluation * std::fabs(bias)) : kInfinity;
      }
    });
    // the last block of rows is multiplied whole
    const int64_t used = std::min(rows, round_up(count, kRowPadding));
    std::fill(panel_.get() + count * padded_, panel_.get() + used * padded_, 0);
    if (coarse_) {
      std::fill(byte_panel_.get() + count * padded_, byte_panel_.get() + used * padded_, 0);
      std::fill(start_.get() + count, start_.get() + used, 0);
    }
  }
};

}  // namespace mik
