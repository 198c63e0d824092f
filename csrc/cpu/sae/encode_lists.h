// SPDX-License-Identifier: Apache-2.0
// encode's lists of candidates, one a token. Included by encode.cpp after the levels of
// encode_body.h.
#pragma once

#include "cpu/sae/encode_panels.h"

namespace mik {

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
class Encoder : EncodePanels<T> {
 public:
  // tokens first..first + count of x
  Encoder(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
          const OptionalTensor& b_enc, const OptionalTensor& b_dec, const OptionalTensor& scale,
          int64_t k)
      : EncodePanels<T>(x, first, count, w, b_enc, b_dec, scale), k_(k) {}

  void run(T* values, int64_t* indices, bool relu) {
    if (this->is_direct()) return direct(values, indices, relu);
    capacity_ = list_capacity(k_, features_);
    candidates_.reset(new Candidate[tokens_ * capacity_]);
    sizes_.reset(new int32_t[tokens_]());
    Lists lists{candidates_.get(), sizes_.get(), capacity_, this, &Encoder::make_room};
    this->each_panel([&](const Panel& panel, const Tokens& tokens, int64_t begin, int64_t end,
                         int64_t block) {
      for (int64_t tile = begin; tile < end; tile += block)
        MIK_SCREEN(screen<Lists>)(panel, tokens, tile, std::min(tile + block, end), lists);
      if (transposed_)  // this panel's fp32 rows are about to be overwritten
        for (int64_t n = begin * kTileTokens; n < std::min(end * kTileTokens, tokens_); ++n)
          settle_token(n);
    }, [] {});
    parallel(tokens_, 8,
             [&](int64_t begin, int64_t end) { finish(begin, end, values, indices, relu); });
  }

 private:
  using EncodePanels<T>::tokens_, EncodePanels<T>::features_, EncodePanels<T>::d_,
      EncodePanels<T>::transposed_, EncodePanels<T>::tau_;
  const int64_t k_;
  int64_t capacity_ = 0;
  std::unique_ptr<Candidate[]> candidates_;
  std::unique_ptr<int32_t[]> sizes_;

  static void make_room(void* self, int64_t token) {
    static thread_local std::vector<float> scratch;
    auto& encoder = *static_cast<Encoder*>(self);
    Candidate* list = encoder.candidates_.get() + token * encoder.capacity_;
    int32_t& size = encoder.sizes_[token];
    size = tighten(list, size, encoder.k_, &encoder.tau_[token], scratch);
    // bounds too wide to separate the candidates: spend the exact scores now
    if (size > encoder.capacity_ - encoder.capacity_ / 4) encoder.settle_token(token);
  }

  Candidate scored(const double* x, int64_t f) const {
    const auto [score, value] = this->exact(x, f);
    return {score, -1, value, static_cast<int32_t>(f)};
  }

  void settle_token(int64_t token) {
    static thread_local std::vector<double> x;
    x.resize(d_);
    this->centred(token, x.data());
    sizes_[token] = settle(candidates_.get() + token * capacity_, sizes_[token], k_, &tau_[token],
                           [&](Candidate& c) { c = scored(x.data(), c.feature); });
  }

  // few tokens: every score exactly, threads over the features, then the k best of each row
  void direct(T* values, int64_t* indices, bool relu) {
    std::unique_ptr<double[]> x(new double[tokens_ * d_]);
    std::unique_ptr<float[]> scores(new float[tokens_ * features_]);
    for (int64_t n = 0; n < tokens_; ++n) this->centred(n, x.get() + n * d_);
    parallel(features_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f)
        for (int64_t n = 0; n < tokens_; ++n)
          scores[n * features_ + f] = this->exact(x.get() + n * d_, f).score;
    });
    std::unique_ptr<int32_t[]> kept(new int32_t[features_]);
    std::vector<Candidate> list(k_);
    for (int64_t n = 0; n < tokens_; ++n) {
      select_row(scores.get() + n * features_, features_, k_, kept.get());
      for (int64_t j = 0; j < k_; ++j) list[j] = scored(x.get() + n * d_, kept[j]);
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
