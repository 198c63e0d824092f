// SPDX-License-Identifier: Apache-2.0
// encode's lists of candidates, one a token. Included by encode.cpp after the levels of its bodies.
#pragma once

#include "cpu/sae/encode_panels.h"

namespace mik {

// about k (1 + ln(F / k)) candidates pass through a list on random rows: 4 k keeps compactions rare
inline int64_t list_capacity(int64_t k, int64_t features) {
  return std::min<int64_t>(4 * k + 64, features + 1);
}

// as many tokens as fit 64 MB of lists and packed rows; the weights are packed once a chunk
inline int64_t tokens_a_chunk(int64_t k, int64_t features, int64_t d) {
  const int64_t bytes = list_capacity(k, features) * 16 + 9 * d;
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
    for (auto* numbers : {&low_, &high_, &value_}) numbers->reset(new float[tokens_ * capacity_]);
    feature_.reset(new int32_t[tokens_ * capacity_]);
    sizes_.reset(new int32_t[tokens_]());
    limits_.reset(new int32_t[tokens_]);
    hard_.reset(new bool[tokens_]());
    for (int64_t n = 0; n < tokens_; ++n) set_limit(n);
    Lists lists{low_.get(),    high_.get(), value_.get(), feature_.get(),     sizes_.get(),
                limits_.get(), capacity_,   this,         &Encoder::make_room};
    this->each_panel(
        [&](const Panel& panel, const Tokens& tokens, int64_t begin, int64_t end, int64_t block) {
          for (int64_t tile = begin; tile < end; tile += block)
            MIK_SCREEN(screen<Lists>)(panel, tokens, tile, std::min(tile + block, end), lists);
        },
        // strided rows: this panel's fp32 copies are about to be overwritten, which tokens that
        // needed exact scores will need again
        [&] {
          if (transposed_) settle_hard();
        });
    score_all();
    parallel(tokens_, 8, [&](int64_t begin, int64_t end) {
      std::vector<Candidate> list;
      for (int64_t n = begin; n < end; ++n)
        write(best_of(n, list), values + n * k_, indices + n * k_, relu);
    });
  }

 private:
  using EncodePanels<T>::tokens_, EncodePanels<T>::features_, EncodePanels<T>::d_,
      EncodePanels<T>::transposed_, EncodePanels<T>::tau_;
  const int64_t k_;
  int64_t capacity_ = 0;
  std::unique_ptr<float[]> low_, high_, value_;
  std::unique_ptr<int32_t[]> feature_, sizes_, limits_;
  // tokens whose bounds did not separate their candidates in this panel
  std::unique_ptr<bool[]> hard_;

  static void make_room(void* self, int64_t token) {
    auto& encoder = *static_cast<Encoder*>(self);
    encoder.tighten(token);
    // bounds too wide to separate the candidates: spend the exact scores now
    if (encoder.sizes_[token] > encoder.capacity_ - encoder.capacity_ / 4) {
      encoder.settle(token);
      encoder.hard_[token] = true;
    }
    encoder.set_limit(token);
  }

  void settle_hard() {
    parallel(tokens_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        if (hard_[n]) settle(n);
    });
    std::fill(hard_.get(), hard_.get() + tokens_, false);
  }

  // when a list is looked at next
  void set_limit(int64_t token) {
    const int64_t more = std::max<int64_t>(k_ / 4, 32);
    limits_[token] =
        static_cast<int32_t>(std::min(capacity_, std::max<int64_t>(sizes_[token], k_) + more));
  }

  void tighten(int64_t token) {
    static thread_local std::vector<int32_t> keys;
    keys.resize(capacity_);
    const int64_t at = token * capacity_, size = sizes_[token];
    if (size >= k_)
      raise(token, MIK_AT_LEVEL(raised)(low_.get() + at, size, k_, tau_[token], keys.data()));
    sizes_[token] = static_cast<int32_t>(
        MIK_AT_LEVEL(drop_below)(tau_[token], low_.get() + at, high_.get() + at, value_.get() + at,
                                 feature_.get() + at, size));
  }

  // h of the candidate at `at`, which becomes exact
  void put(int64_t at, int64_t f, float h) {
    const float score = this->ranked(h, f);
    value_[at] = h;
    low_[at] = high_[at] = score == score ? score : kInfinity;
    feature_[at] = static_cast<int32_t>(~f);
  }

  // scores a token's candidates and keeps the k best
  __attribute__((noinline)) void settle(int64_t token) {
    static thread_local std::vector<double> x;
    static thread_local std::vector<Candidate> list;
    x.resize(d_);
    this->centred(token, x.data());
    const int64_t begin = token * capacity_, end = begin + sizes_[token];
    for (int64_t at = begin; at < end; ++at)
      if (feature_[at] >= 0) put(at, feature_[at], this->exact(x.data(), feature_[at]).value);
    best_of(token, list);
    int64_t at = begin;
    for (const Candidate& c : list) put(at++, c.feature, c.value);
    sizes_[token] = static_cast<int32_t>(list.size());
    if (static_cast<int64_t>(list.size()) == k_)
      raise(token, *std::min_element(low_.get() + begin, low_.get() + at));
  }

  // never infinite: what may be infinite may be NaN, which ranks before it
  void raise(int64_t token, float to) {
    tau_[token] = std::max(tau_[token], std::min(to, std::numeric_limits<float>::max()));
  }

  // the k best of a token's candidates, which are exact
  std::vector<Candidate>& best_of(int64_t token, std::vector<Candidate>& list) const {
    const int64_t begin = token * capacity_;
    list.resize(sizes_[token]);
    for (int64_t i = 0; i < sizes_[token]; ++i) {
      const int32_t f = ~feature_[begin + i];
      list[i] = {this->ranked(value_[begin + i], f), -1, value_[begin + i], f};
    }
    list.resize(keep_best(list.data(), static_cast<int64_t>(list.size()), k_));
    return list;
  }

  // scores all candidates, a feature's together, so that the weights pass by once (a token at a
  // time: 35 ms at S1, by feature 16; prototype, two Zen 4 cores)
  void score_all() {
    parallel(tokens_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) tighten(n);
    });
    std::vector<int64_t> begins(features_ + 1), next;
    const auto each = [&](auto&& f) {
      for (int64_t n = 0; n < tokens_; ++n)
        for (int64_t at = n * capacity_; at < n * capacity_ + sizes_[n]; ++at)
          if (feature_[at] >= 0) f(n, at);
    };
    each([&](int64_t, int64_t at) { ++begins[feature_[at] + 1]; });
    for (int64_t f = 0; f < features_; ++f) begins[f + 1] += begins[f];
    next = begins;
    struct Place {
      int64_t at;
      int32_t token;
    };
    std::vector<Place> places(begins[features_]);
    each([&](int64_t n, int64_t at) {
      places[next[feature_[at]]++] = {at, static_cast<int32_t>(n)};
    });
    parallel(features_, 64, [&](int64_t begin, int64_t end) {
      constexpr int64_t some = 16;
      const float* x[some];
      float h[some];
      this->each_weights(begin, end, [&](int64_t f, const float* weights) {
        for (int64_t first = begins[f]; first < begins[f + 1]; first += some) {
          const int64_t count = std::min(some, begins[f + 1] - first);
          for (int64_t i = 0; i < count; ++i) x[i] = this->activations(places[first + i].token);
          this->exact(weights, f, x, count, h);
          for (int64_t i = 0; i < count; ++i) put(places[first + i].at, f, h[i]);
        }
      });
    });
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
      for (int64_t j = 0; j < k_; ++j) {
        const auto [score, value] = this->exact(x.get() + n * d_, kept[j]);
        list[j] = {score, -1, value, kept[j]};
      }
      write(list, values + n * k_, indices + n * k_, relu);
    }
  }

  // the k winners of a token by ascending feature
  void write(std::vector<Candidate>& list, T* values, int64_t* indices, bool relu) const {
    std::sort(list.begin(), list.end(),
              [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
    for (int64_t j = 0; j < k_; ++j) {
      const float h = list[j].value;
      values[j] = static_cast<T>(relu && h <= 0 ? 0.f : h);
      indices[j] = list[j].feature;
    }
  }
};

}  // namespace mik
