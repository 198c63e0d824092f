// SPDX-License-Identifier: Apache-2.0
// batch_topk_encode: the best pairs of a whole batch; the method is in
// mikernels/ops/sae/batch_topk_encode.py and encode.py. encode_panels.h packs and deals out the
// work, encode_body.h screens, batch_pool.h selects.
#include "common.h"
#include "cpu/sae/batch_pool.h"
#include "cpu/sae/encode.h"

#define MIK_BODY "cpu/sae/encode_body.h"
#include "cpu/simd/each_screen_level.h"

#include "cpu/sae/encode_panels.h"

namespace mik {
namespace {

// candidates of one thread before they go to the pool: 20 KB
constexpr int64_t kBuffered = 1024;
// packed tokens of one chunk; the weights are packed once a chunk
constexpr int64_t kTokenBytes = 64 << 20;

template <class T>
class BatchEncoder : EncodePanels<T> {
 public:
  using C = BatchCandidate<float>;

  // tokens first..first + count of x
  BatchEncoder(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
               const OptionalTensor& b_enc, const OptionalTensor& b_dec,
               const OptionalTensor& scale, BatchPool<float>& pool)
      : EncodePanels<T>(x, first, count, w, b_enc, b_dec, scale), chunk_(first), pool_(pool) {}

  void run() {
    if (this->is_direct()) return direct();
    this->each_panel(
        [&](const Panel& panel, const Tokens& tokens, int64_t begin, int64_t end, int64_t block) {
          Buffer buffer(*this, tokens.tau);
          for (int64_t tile = begin; tile < end; tile += block) {
            buffer.first = tile * kTileTokens;
            buffer.last = std::min(tile + block, end) * kTileTokens;
            buffer.tighten_tokens();
            MIK_SCREEN(screen<Buffer>)(panel, tokens, tile, std::min(tile + block, end), buffer);
            buffer.flush();
          }
        },
        // strided rows: this panel's fp32 copies are about to be overwritten
        [&] {
          if (this->transposed_) settle();
        });
    settle();
  }

 private:
  // one thread's, for tokens first..last, whose bounds it raises
  struct Buffer {
    static constexpr bool kFloors = false, kStrict = false;

    BatchEncoder& encoder;
    float* tau;
    std::unique_ptr<C[]> list{new C[kBuffered]};
    int64_t size = 0, first = 0, last = 0;

    Buffer(BatchEncoder& owner, float* bounds) : encoder(owner), tau(bounds) {}

    const float* bounds(const Tokens& tokens, int64_t, int64_t n) const { return tokens.tau + n; }

    void add(int64_t token, int64_t feature, float score, float slack) {
      list[size++] = {score, slack, 0.f, static_cast<int32_t>(feature),
                      static_cast<int32_t>(encoder.chunk_ + token)};
      if (size == kBuffered) flush();
    }

    // not inlined: the products around it would lose their registers (half the speed, GCC 12)
    __attribute__((noinline)) void flush() {
      const float bound = encoder.pool_.bound();
      const bool wide = encoder.pool_.is_wide();
      int64_t kept = 0;
      for (int64_t i = 0; i < size; ++i) {
        if (!may_reach(list[i], bound)) continue;
        list[kept] = list[i];
        // of an unbounded score nothing else will ever be known
        if (wide || !list[kept].known()) encoder.score(list[kept].token, &list[kept], 1);
        ++kept;
      }
      encoder.pool_.add(list.get(), kept, encoder.scorer());
      size = 0;
      tighten_tokens();
    }

    void tighten_tokens() { std::fill(tau + first, tau + last, encoder.pool_.bound()); }
  };

  const int64_t chunk_;
  BatchPool<float>& pool_;

  // exact scores of candidates of one token
  void score(int64_t token, C* list, int64_t count) const {
    static thread_local std::vector<double> x;
    x.resize(this->d_);
    bool fetched = false;
    for (int64_t i = 0; i < count; ++i) {
      if (list[i].exact()) continue;
      if (!fetched) this->centred(token - chunk_, x.data());
      fetched = true;
      const auto [score, value] = this->exact(x.data(), list[i].feature);
      list[i] = {score, -1, value, list[i].feature, list[i].token};
    }
  }

  auto scorer() const {
    return [this](int64_t token, C* list, int64_t count) { score(token, list, count); };
  }

  void settle() { pool_.settle(scorer()); }

  // few tokens: every score exactly, threads over the features
  void direct() {
    std::unique_ptr<double[]> x(new double[this->tokens_ * this->d_]);
    for (int64_t n = 0; n < this->tokens_; ++n) this->centred(n, x.get() + n * this->d_);
    parallel(this->features_, 64, [&](int64_t begin, int64_t end) {
      std::vector<C> found;
      for (int64_t f = begin; f < end; ++f)
        for (int64_t n = 0; n < this->tokens_; ++n) {
          const auto [score, value] = this->exact(x.get() + n * this->d_, f);
          found.push_back(
              {score, -1, value, static_cast<int32_t>(f), static_cast<int32_t>(chunk_ + n)});
        }
      pool_.add(found.data(), static_cast<int64_t>(found.size()), scorer());
    });
    settle();
  }
};

template <class T>
void find(const Tensor& x, const Tensor& w, const OptionalTensor& b_enc,
          const OptionalTensor& b_dec, const OptionalTensor& scale, BatchPool<float>& pool) {
  const int64_t n = x.size(0), row = 2 * std::max(round_up(w.size(1), kDimPadding), kDimPadding);
  const int64_t chunk = std::max(kTokenBytes / row / kTokenPadding * kTokenPadding, kTokenPadding);
  for (int64_t first = 0; first < n; first += chunk)
    BatchEncoder<T>(x, first, std::min(chunk, n - first), w, b_enc, b_dec, scale, pool).run();
}

// fp64 needs no screen: it is for gradcheck and oracles
template <class T>
void find(const Tensor& x, const Tensor& w, const OptionalTensor& b_enc_,
          const OptionalTensor& b_dec_, const OptionalTensor& scale_, BatchPool<double>& pool) {
  using C = BatchCandidate<double>;
  const double *b_enc = data_or_null<double>(b_enc_), *b_dec = data_or_null<double>(b_dec_),
               *scale = data_or_null<double>(scale_);
  const int64_t features = w.size(0), d = w.size(1), w0 = w.stride(0), w1 = w.stride(1);
  const auto exact_already = [](int64_t, C*, int64_t) {};
  parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<C> found(features);
    for (int64_t n = begin; n < end; ++n) {
      const double *row = data<double>(x) + n * x.stride(0), *weights = data<double>(w);
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i)
          sum += (row[i] - (b_dec == nullptr ? 0. : b_dec[i])) * weights[f * w0 + i * w1];
        const double h = sum + (b_enc == nullptr ? 0. : b_enc[f]);
        found[f] = {scale == nullptr ? h : h * scale[f], -1, h, static_cast<int32_t>(f),
                    static_cast<int32_t>(n)};
      }
      pool.add(found.data(), features, exact_already);
    }
  });
  pool.settle(exact_already);
}

template <class T, class S>
void write(const BatchPool<S>& pool, int64_t tokens, bool relu, T* values, int64_t* indices,
           int64_t* row_offsets, S* threshold) {
  using C = BatchCandidate<S>;
  std::vector<C> slots;
  const auto begins = by_token(pool.data(), pool.size(), tokens, slots);
  std::copy(begins.begin(), begins.end(), row_offsets);
  const auto clamped = [relu](S h) { return relu && h <= 0 ? S(0) : h; };
  parallel(tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      std::sort(slots.data() + begins[n], slots.data() + begins[n + 1],
                [](const C& a, const C& b) { return a.feature < b.feature; });
    for (int64_t s = begins[begin]; s < begins[end]; ++s) {
      values[s] = static_cast<T>(clamped(slots[s].value));
      indices[s] = slots[s].feature;
    }
  });
  const auto worst = std::max_element(slots.begin(), slots.end(),
                                      [](const C& a, const C& b) { return better(a, b); });
  *threshold = worst == slots.end() ? std::numeric_limits<S>::infinity() : clamped(worst->score);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk_encode(Tensor x, Tensor w,
                                                             OptionalTensor b_enc,
                                                             OptionalTensor b_dec,
                                                             OptionalTensor scale, int64_t total,
                                                             bool relu) {
  x = check_encoder("batch_topk_encode", x, w, b_enc, b_dec, scale);
  const int64_t n = x.size(0), features = w.size(0);
  check(n < INT32_MAX, "batch_topk_encode: at most 2^31 - 2 tokens");
  check(total >= 0 && total <= n * features, "batch_topk_encode: total must be in 0..N F");
  Tensor values = empty(x, {total}), indices = empty(x, {total}, ScalarType::Long);
  Tensor row_offsets = empty(x, {n + 1}, ScalarType::Long);
  const bool wide = x.scalar_type() == ScalarType::Double;
  Tensor threshold = empty(x, {}, wide ? ScalarType::Double : ScalarType::Float);
  MIK_DISPATCH_FLOATING(x, [&] {
    using S = accumulator_t<scalar_t>;
    BatchPool<S> pool(total, n * features, n);
    if (total > 0) find<scalar_t>(x, w, b_enc, b_dec, scale, pool);
    write(pool, n, relu, mutable_data<scalar_t>(values), mutable_data<int64_t>(indices),
          mutable_data<int64_t>(row_offsets), mutable_data<S>(threshold));
  });
  return {values, indices, row_offsets, threshold};
}

MIK_REGISTER(CPU, m) { m.impl("batch_topk_encode", TORCH_BOX(&batch_topk_encode)); }

}  // namespace
}  // namespace mik
