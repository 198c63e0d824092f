// SPDX-License-Identifier: Apache-2.0
// The encode driver: packs tokens and feature panels, shares them among threads. Included by
// encode.cpp after the levels of encode_body.h.
#pragma once

namespace mik {

constexpr int64_t kPanelBytes = 16 << 20;
// below this packing the weights costs more than it saves
constexpr int64_t kDirectTokens = 8, kDirectScores = 1 << 22;

// about k (1 + ln(F / k)) candidates pass through a list on random rows: 4 k keeps compactions rare
inline int64_t list_capacity(int64_t k, int64_t features) {
  return std::min<int64_t>(4 * k + 64, features + 1);
}

// as many tokens as fit 64 MB of lists and packed rows; the weights are packed once a chunk
inline int64_t tokens_a_chunk(int64_t k, int64_t features, int64_t d) {
  const int64_t bytes =
      list_capacity(k, features) * static_cast<int64_t>(sizeof(Candidate)) + 2 * d;
  return std::max<int64_t>((64 << 20) / bytes / kTokenPadding * kTokenPadding, kTokenPadding);
}

template <class T>
class Encoder {
 public:
  // tokens first..first + count of x
  Encoder(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
          const OptionalTensor& b_enc, const OptionalTensor& b_dec, const OptionalTensor& scale,
          int64_t k)
      : x_(data<T>(x) + first * x.stride(0)),
        ldx_(x.stride(0)),
        w_(w),
        k_(k),
        tokens_(count),
        features_(w.size(0)),
        d_(w.size(1)),
        padded_(round_up(d_, kDimPadding)),
        transposed_(w.stride(1) != 1 && d_ > 1),
        b_enc_(data_or_null<T>(b_enc)),
        b_dec_(data_or_null<T>(b_dec)),
        scale_(data_or_null<T>(scale)) {}

  void run(T* values, int64_t* indices, bool relu) {
    if (tokens_ <= kDirectTokens && !transposed_ && tokens_ * features_ <= kDirectScores)
      return direct(values, indices, relu);
    pack_tokens();
    const int64_t by_memory = kPanelBytes / (2 * padded_) / kRowPadding * kRowPadding;
    const int64_t rows =
        std::min(std::max(by_memory, kRowPadding), round_up(features_, kRowPadding));
    panel_.reset(new uint16_t[rows * padded_]);
    terms_.reset(new float[6 * rows]);
    if (transposed_) panel_copy_.reset(new float[rows * d_]);
    for (first_ = 0; first_ < features_; first_ += rows) {
      const int64_t count = std::min(rows, features_ - first_);
      pack_panel(count, rows);
      screen_panel(count, rows);
    }
    parallel(tokens_, 8,
             [&](int64_t begin, int64_t end) { finish(begin, end, values, indices, relu); });
  }

 private:
  const T* x_;
  const int64_t ldx_;
  const Tensor& w_;
  const int64_t k_, tokens_, features_, d_, padded_;
  const bool transposed_;
  const T *b_enc_, *b_dec_, *scale_;
  int64_t first_ = 0, capacity_ = 0, token_slots_ = 0;
  std::unique_ptr<uint16_t[]> tiles_, panel_;
  std::unique_ptr<float[]> sx_, ex_, nx_, tau_, terms_, panel_copy_;
  std::unique_ptr<Candidate[]> candidates_;
  std::unique_ptr<int32_t[]> sizes_;

  // x[n] - b_dec, rounded to fp32 once: from here on these numbers are exact
  template <class Out>
  void centred(int64_t n, Out* out) const {
    const T* row = x_ + n * ldx_;
    for (int64_t i = 0; i < d_; ++i) {
      const float value = static_cast<float>(row[i]);
      out[i] = b_dec_ == nullptr ? value : value - static_cast<float>(b_dec_[i]);
    }
  }

  void pack_tokens() {
    token_slots_ = round_up(tokens_, kTokenPadding);
    capacity_ = list_capacity(k_, features_);
    tiles_.reset(new uint16_t[token_slots_ * padded_]());
    for (auto* terms : {&sx_, &ex_, &nx_, &tau_}) terms->reset(new float[token_slots_]());
    candidates_.reset(new Candidate[tokens_ * capacity_]);
    sizes_.reset(new int32_t[tokens_]());
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

  void screen_panel(int64_t count, int64_t rows) {
    const float* t = terms_.get();
    const Panel panel{panel_.get(), padded_,      count,        first_,       t,
                      t + rows,     t + 2 * rows, t + 3 * rows, t + 4 * rows, t + 5 * rows};
    const Tokens tokens{
        tiles_.get(), kTileTokens * padded_, padded_ / 2, tokens_, sx_.get(), ex_.get(), nx_.get(),
        tau_.get()};
    const Lists lists{candidates_.get(), sizes_.get(), capacity_, this, &Encoder::make_room};
    const int64_t block = tiles_in_cache(padded_);
    parallel(token_slots_ / kTokenPadding, 1, [&](int64_t begin, int64_t end) {
      // the units of the split are two tiles, so that every level's token block fits
      begin *= 2;
      end *= 2;
      for (int64_t tile = begin; tile < end; tile += block)
        MIK_SCREEN(screen)(panel, tokens, tile, std::min(tile + block, end), lists);
      if (transposed_)  // this panel's fp32 rows are about to be overwritten
        for (int64_t n = begin * kTileTokens; n < std::min(end * kTileTokens, tokens_); ++n)
          settle_token(n);
    });
  }

  static void make_room(void* self, int64_t token) {
    static thread_local std::vector<float> scratch;
    auto& encoder = *static_cast<Encoder*>(self);
    Candidate* list = encoder.candidates_.get() + token * encoder.capacity_;
    int32_t& size = encoder.sizes_[token];
    size = tighten(list, size, encoder.k_, &encoder.tau_[token], scratch);
    // bounds too wide to separate the candidates: spend the exact scores now
    if (size > encoder.capacity_ - encoder.capacity_ / 4) encoder.settle_token(token);
  }

  // h of one feature and, times its rank, what it is ordered by
  Candidate exact(const double* x, int64_t f) const {
    const double dot =
        transposed_ ? exact_dot(x, panel_copy_.get() + (f - first_) * d_, d_)
                    : exact_dot(x, data<T>(w_) + f * w_.stride(0), d_);
    const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[f]);
    const float h = static_cast<float>(dot + bias);
    return {scale_ == nullptr ? h : h * static_cast<float>(scale_[f]), -1, h,
            static_cast<int32_t>(f)};
  }

  void settle_token(int64_t token) {
    static thread_local std::vector<double> x;
    x.resize(d_);
    centred(token, x.data());
    sizes_[token] = settle(candidates_.get() + token * capacity_, sizes_[token], k_, &tau_[token],
                           [&](Candidate& c) { c = exact(x.data(), c.feature); });
  }

  // few tokens: every score exactly, threads over the features, then the k best of each row
  void direct(T* values, int64_t* indices, bool relu) {
    std::unique_ptr<double[]> x(new double[tokens_ * d_]);
    std::unique_ptr<float[]> scores(new float[tokens_ * features_]);
    for (int64_t n = 0; n < tokens_; ++n) centred(n, x.get() + n * d_);
    parallel(features_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f)
        for (int64_t n = 0; n < tokens_; ++n)
          scores[n * features_ + f] = exact(x.get() + n * d_, f).score;
    });
    std::unique_ptr<int32_t[]> kept(new int32_t[features_]);
    std::vector<Candidate> list(k_);
    for (int64_t n = 0; n < tokens_; ++n) {
      select_row(scores.get() + n * features_, features_, k_, kept.get());
      for (int64_t j = 0; j < k_; ++j) list[j] = exact(x.get() + n * d_, kept[j]);
      write(list.data(), values + n * k_, indices + n * k_, relu);
    }
  }

  // the k winners of a token by ascending feature
  void write(Candidate* list, T* values, int64_t* indices, bool relu) const {
    std::sort(list, list + k_,
              [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
    for (int64_t j = 0; j < k_; ++j) {
      const float h = list[j].value;
      values[j] = static_cast<T>(relu && h <= 0 ? 0.f : h);
      indices[j] = list[j].feature;
    }
  }

  void finish(int64_t begin, int64_t end, T* values, int64_t* indices, bool relu) {
    for (int64_t n = begin; n < end; ++n) {
      settle_token(n);
      write(candidates_.get() + n * capacity_, values + n * k_, indices + n * k_, relu);
    }
  }
};

}  // namespace mik
