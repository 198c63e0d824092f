// SPDX-License-Identifier: Apache-2.0
// encode: exact top-k of (x - b_dec) w^T + b_enc without the matrix; the method and its proof are in
// mikernels/ops/encode.py. Here: packing, panels, threads. encode_body.h screens, encode_lists.h
// selects.
#include "cpu/encode.h"

#include "common.h"
#include "cpu/amx.h"
#include "cpu/encode_lists.h"

#if MIK_X86_LEVELS
#include <immintrin.h>
#endif

#define MIK_BODY "cpu/encode_body.h"
#include "cpu/each_level.h"
#if MIK_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace mik::amx {
#define MIK_VECTOR_BYTES 64
#define MIK_AMX_TILES
#include "cpu/encode_body.h"
#undef MIK_AMX_TILES
#undef MIK_VECTOR_BYTES
}  // namespace mik::amx
#pragma GCC pop_options
#define MIK_SCREEN(f) (::mik::active_level() == ::mik::Level::amx ? amx::f : MIK_AT_LEVEL(f))
#else
#define MIK_SCREEN(f) (MIK_AT_LEVEL(f))
#endif

namespace mik {
namespace {

constexpr int64_t kPanelBytes = 16 << 20;
// rows of one panel are padded to the largest register block, dimensions to one AMX tile row
constexpr int64_t kRowPadding = 96, kDimPadding = 32, kTokenPadding = 32;
// u = 2^-24: the share of a bound that covers fp32 evaluation, and the norms' own rounding
constexpr double kEvaluation = 16 * 0x1p-24, kUp = 1 + 0x1p-20;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T>
class Encoder {
 public:
  Encoder(const Tensor& x, const Tensor& w, const OptionalTensor& b_enc, const OptionalTensor& b_dec,
          const OptionalTensor& scale, int64_t k)
      : x_(x), w_(w), k_(k), tokens_(x.size(0)), features_(w.size(0)), d_(w.size(1)),
        padded_(round_up(d_, kDimPadding)), transposed_(w.stride(1) != 1 && d_ > 1),
        b_enc_(data_or_null<T>(b_enc)), b_dec_(data_or_null<T>(b_dec)),
        scale_(data_or_null<T>(scale)) {}

  void run(T* values, int64_t* indices, bool relu) {
    pack_tokens();
    const int64_t by_memory = kPanelBytes / (2 * padded_) / kRowPadding * kRowPadding;
    const int64_t rows = std::min(std::max(by_memory, kRowPadding), round_up(features_, kRowPadding));
    panel_.reset(new uint16_t[rows * padded_]);
    terms_.reset(new float[6 * rows]);
    if (transposed_) panel_copy_.reset(new float[rows * d_]);
    for (first_ = 0; first_ < features_; first_ += rows) {
      const int64_t count = std::min(rows, features_ - first_);
      pack_panel(count, rows);
      screen_panel(count, rows);
    }
    parallel(tokens_, 8, [&](int64_t begin, int64_t end) { finish(begin, end, values, indices, relu); });
  }

 private:
  const Tensor &x_, &w_;
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
    const T* row = data<T>(x_) + n * x_.stride(0);
    for (int64_t i = 0; i < d_; ++i) {
      const float value = static_cast<float>(row[i]);
      out[i] = b_dec_ == nullptr ? value : value - static_cast<float>(b_dec_[i]);
    }
  }

  void pack_tokens() {
    token_slots_ = round_up(tokens_, kTokenPadding);
    // a list refills 1 + ln(F / k) times on random rows; 4 k keeps compactions rare
    capacity_ = std::min<int64_t>(4 * k_ + 64, features_ + 1);
    tiles_.reset(new uint16_t[token_slots_ * padded_]());
    for (auto* terms : {&sx_, &ex_, &nx_, &tau_}) terms->reset(new float[token_slots_]());
    candidates_.reset(new Candidate[tokens_ * capacity_]);
    sizes_.reset(new int32_t[tokens_]());
    parallel(tokens_, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> row(d_);
      std::vector<uint16_t> quantised(padded_);
      for (int64_t n = begin; n < end; ++n) {
        centred(n, row.data());
        const auto [scale, norm, error] = quantise(row.data(), quantised.data());
        sx_[n] = static_cast<float>(scale);
        ex_[n] = static_cast<float>(error * kUp);
        nx_[n] = static_cast<float>((norm + error) * kUp);
        tau_[n] = -kInfinity;
        uint16_t* tile = tiles_.get() + n / kTileTokens * kTileTokens * padded_ + n % kTileTokens * 2;
        for (int64_t pair = 0; pair < padded_ / 2; ++pair)
          std::memcpy(tile + pair * kTileTokens * 2, quantised.data() + pair * 2, 4);
      }
    });
  }

  struct Row {
    double scale, norm, error;
  };

  Row quantise(const float* row, uint16_t* out) const {
    const auto at = [&](const auto& r) { return Row{r.scale, r.norm, r.error}; };
    switch (active_level()) {
#if MIK_X86_LEVELS
      case Level::amx: return at(amx::quantise_row(row, d_, out, padded_));
      case Level::avx512: return at(avx512::quantise_row(row, d_, out, padded_));
      case Level::avx2: return at(avx2::quantise_row(row, d_, out, padded_));
#endif
      default: return at(portable::quantise_row(row, d_, out, padded_));
    }
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
    // fp32 sums of 2 ceil(d / 2) products on AMX, exact integers elsewhere
    const double accumulation =
        active_level() == Level::amx ? 2. * static_cast<double>(padded_) * 0x1p-24 : 0.;
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
        const Row q = quantise(source, panel_.get() + f * padded_);
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
    const Panel panel{panel_.get(), padded_, count, first_, t, t + rows, t + 2 * rows, t + 3 * rows,
                      t + 4 * rows, t + 5 * rows};
    const Tokens tokens{tiles_.get(), kTileTokens * padded_, padded_ / 2, tokens_,
                        sx_.get(), ex_.get(), nx_.get(), tau_.get()};
    const Lists lists{candidates_.get(), sizes_.get(), capacity_, this, &Encoder::make_room};
    // half of the L2 for the tokens, the rest for what streams: 512 KB on Zen 3, 2 MB with AVX-512
    const int64_t l2 = active_level() >= Level::avx512 ? 1 << 20 : 1 << 18;
    const int64_t block = std::max<int64_t>(l2 / (kTileTokens * 2 * padded_) / 2 * 2, 2);
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

  void settle_token(int64_t token) {
    static thread_local std::vector<double> x;
    x.resize(d_);
    centred(token, x.data());
    Candidate* list = candidates_.get() + token * capacity_;
    const auto score = [&](Candidate& c) {
      const int64_t f = c.feature;
      const double dot = transposed_
          ? MIK_AT_LEVEL(exact_dot<float>)(x.data(), panel_copy_.get() + (f - first_) * d_, d_)
          : MIK_AT_LEVEL(exact_dot<T>)(x.data(), data<T>(w_) + f * w_.stride(0), d_);
      const double bias = b_enc_ == nullptr ? 0. : static_cast<float>(b_enc_[f]);
      c.value = static_cast<float>(dot + bias);
      c.score = scale_ == nullptr ? c.value : c.value * static_cast<float>(scale_[f]);
      c.slack = -1;
    };
    sizes_[token] = settle(list, sizes_[token], k_, &tau_[token], score);
  }

  void finish(int64_t begin, int64_t end, T* values, int64_t* indices, bool relu) {
    for (int64_t n = begin; n < end; ++n) {
      settle_token(n);
      Candidate* list = candidates_.get() + n * capacity_;
      std::sort(list, list + k_,
                [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
      for (int64_t j = 0; j < k_; ++j) {
        const float h = list[j].value;
        values[n * k_ + j] = static_cast<T>(relu && h <= 0 ? 0.f : h);
        indices[n * k_ + j] = list[j].feature;
      }
    }
  }
};

// fp64 needs no screen: it is for gradcheck and oracles
void encode_double(const Tensor& x, const Tensor& w, const double* b_enc, const double* b_dec,
                   const double* scale, int64_t k, bool relu, double* values, int64_t* indices) {
  const int64_t features = w.size(0), d = w.size(1), w0 = w.stride(0), w1 = w.stride(1);
  parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> h(features);
    std::vector<int64_t> order(features);
    for (int64_t n = begin; n < end; ++n) {
      const double *row = data<double>(x) + n * x.stride(0), *weights = data<double>(w);
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i)
          sum += (row[i] - (b_dec == nullptr ? 0. : b_dec[i])) * weights[f * w0 + i * w1];
        h[f] = sum + (b_enc == nullptr ? 0. : b_enc[f]);
        order[f] = f;
      }
      const auto key = [&](int64_t f) { return rank_key(scale == nullptr ? h[f] : h[f] * scale[f]); };
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), [&](int64_t a, int64_t b) {
        return key(a) != key(b) ? key(a) > key(b) : a < b;
      });
      std::sort(order.begin(), order.begin() + k);
      for (int64_t j = 0; j < k; ++j) {
        indices[n * k + j] = order[j];
        values[n * k + j] = relu && h[order[j]] <= 0 ? 0. : h[order[j]];
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode(Tensor x, Tensor w, OptionalTensor b_enc, OptionalTensor b_dec,
                                  OptionalTensor scale, int64_t k, bool relu) {
  check(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && x.scalar_type() == w.scalar_type(),
        "encode: expected x [N, d] and w_enc [F, d] of one dtype");
  check(k >= 1 && k <= w.size(0), "encode: k must be in 1..F");
  check(w.size(0) < INT32_MAX, "encode: at most 2^31 - 2 features");
  x = dense_rows(x);
  const int64_t sizes[] = {w.size(0), x.size(1), w.size(0)};
  int at = 0;
  for (OptionalTensor* term : {&b_enc, &b_dec, &scale}) {
    if (term->has_value()) {
      check((*term)->numel() == sizes[at] && (*term)->scalar_type() == x.scalar_type(),
            "encode: b_enc [F], b_dec [d] and scale [F] must have the dtype of x");
      *term = torch::stable::contiguous(**term);
    }
    ++at;
  }
  const int64_t n = x.size(0);
  Tensor values = empty(x, {n, k}), indices = empty(x, {n, k}, ScalarType::Long);
  if (n == 0) return {values, indices};
  MIK_DISPATCH_FLOATING(x, [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      encode_double(x, w, data_or_null<double>(b_enc), data_or_null<double>(b_dec),
                    data_or_null<double>(scale), k, relu, mutable_data<double>(values),
                    mutable_data<int64_t>(indices));
    } else {
      Encoder<scalar_t>(x, w, b_enc, b_dec, scale, k)
          .run(mutable_data<scalar_t>(values), mutable_data<int64_t>(indices), relu);
    }
  });
  return {values, indices};
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) { m.impl("encode", TORCH_BOX(&encode)); }

}  // namespace
}  // namespace mik
