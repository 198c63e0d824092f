// SPDX-License-Identifier: Apache-2.0
// threshold_encode: every pair above its feature's floor; the method is in
// mikernels/ops/sae/threshold_encode.py and encode.py. encode_panels.h packs and deals out the
// work, encode_body.h screens, ragged_slots.h puts what was found in order.
#include "common.h"
#include "cpu/sae/encode.h"
#include "cpu/sae/ragged_slots.h"

#define MIK_BODY "cpu/sae/encode_body.h"
#include "cpu/simd/each_screen_level.h"

#include "cpu/sae/encode_panels.h"

namespace mik {
namespace {

// pairs that passed the screen before they are computed, of one thread: 256 KB. Where half of all
// do, they are of 50 features whose rows then stay in the second-level cache
constexpr int64_t kBuffered = 1 << 14;
// packed tokens of one chunk; the weights are packed once a chunk
constexpr int64_t kTokenBytes = 64 << 20;

// NaN scores are kept
template <class S>
bool is_above(S h, S floor) {
  return !(h <= floor);
}

template <class S>
using Slots = RaggedSlots<S>;

// what one token keeps of all its scores
template <class S>
typename Slots<S>::Block above(int64_t token, const S* h, const S* floor, int64_t features) {
  typename Slots<S>::Block block;
  for (int64_t f = 0; f < features; ++f)
    if (is_above(h[f], floor[f])) block.slots.push_back({h[f], static_cast<int32_t>(f)});
  block.runs.push_back({static_cast<int32_t>(token), static_cast<int32_t>(block.slots.size())});
  return block;
}

template <class T>
class ThresholdEncoder : EncodePanels<T> {
 public:
  // tokens first..first + count of x
  ThresholdEncoder(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
                   const OptionalTensor& b_enc, const OptionalTensor& b_dec, const float* floor,
                   Slots<float>& slots)
      : EncodePanels<T>(x, first, count, w, b_enc, b_dec, std::nullopt),
        chunk_(first),
        slots_(slots) {
    this->floor_ = floor;
  }

  void run() {
    if (this->is_direct()) return direct();
    this->each_panel(
        [&](const Panel& panel, const Tokens& tokens, int64_t begin, int64_t end, int64_t block) {
          Survivors survivors(*this, block * kTileTokens);
          for (int64_t tile = begin; tile < end; tile += block) {
            const int64_t last = std::min(tile + block, end);
            survivors.first = tile * kTileTokens;
            MIK_SCREEN(screen<Survivors>)(panel, tokens, tile, last, survivors);
            survivors.flush();
          }
          slots_.add(std::move(survivors.part));
        },
        [&] { slots_.next_pass(); });
  }

 private:
  const int64_t chunk_;
  Slots<float>& slots_;

  // one thread's, of a panel and tokens first.. of a block
  struct Survivors {
    static constexpr bool kFloors = true, kStrict = false;
    struct Pair {
      int32_t token, feature;
    };

    const ThresholdEncoder& encoder;
    typename Slots<float>::Part part;
    std::unique_ptr<Pair[]> list{new Pair[kBuffered]};
    std::unique_ptr<int32_t[]> features{new int32_t[kBuffered]};
    std::unique_ptr<float[]> h{new float[kBuffered]};
    std::vector<int32_t> begins, next;
    std::vector<double> x;
    int64_t size = 0, first = 0;

    Survivors(const ThresholdEncoder& owner, int64_t tokens)
        : encoder(owner), begins(tokens + 1), x(owner.d_) {}

    void add(int64_t token, int64_t feature, float, float) {
      list[size++] = {static_cast<int32_t>(token - first), static_cast<int32_t>(feature)};
      if (size == kBuffered) flush();
    }

    // computes the scores, a token's together, and keeps those above the floor. Not inlined, as in
    // batch_topk_encode.cpp. Features come in ascending order, and stay in it
    __attribute__((noinline)) void flush() {
      std::fill(begins.begin(), begins.end(), 0);
      for (int64_t i = 0; i < size; ++i) ++begins[list[i].token + 1];
      for (size_t t = 1; t < begins.size(); ++t) begins[t] += begins[t - 1];
      next = begins;
      for (int64_t i = 0; i < size; ++i) features[next[list[i].token]++] = list[i].feature;
      size = 0;
      typename Slots<float>::Block block;
      int64_t kept = 0;
      for (size_t t = 0; t + 1 < begins.size(); ++t) {
        const int64_t begin = begins[t], end = begins[t + 1];
        if (begin == end) continue;
        encoder.centred(first + t, x.data());
        encoder.exact(x.data(), features.get() + begin, end - begin, h.get() + begin);
        const int64_t before = kept;
        for (int64_t i = begin; i < end; ++i)
          if (is_above(h[i], encoder.floor_[features[i]])) {
            h[kept] = h[i];
            features[kept++] = features[i];
          }
        if (kept > before)
          block.runs.push_back({static_cast<int32_t>(encoder.chunk_ + first + t),
                                static_cast<int32_t>(kept - before)});
      }
      if (kept == 0) return;
      block.slots.resize(kept);
      for (int64_t i = 0; i < kept; ++i) block.slots[i] = {h[i], features[i]};
      part.push_back(std::move(block));
    }
  };

  // few tokens: every score exactly, threads over the features
  void direct() {
    std::unique_ptr<double[]> x(new double[this->tokens_ * this->d_]);
    std::unique_ptr<float[]> scores(new float[this->tokens_ * this->features_]);
    for (int64_t n = 0; n < this->tokens_; ++n) this->centred(n, x.get() + n * this->d_);
    parallel(this->features_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f)
        for (int64_t n = 0; n < this->tokens_; ++n)
          scores[n * this->features_ + f] = this->exact(x.get() + n * this->d_, f).score;
    });
    typename Slots<float>::Part part;
    for (int64_t n = 0; n < this->tokens_; ++n)
      part.push_back(
          above(chunk_ + n, scores.get() + n * this->features_, this->floor_, this->features_));
    slots_.add(std::move(part));
    slots_.next_pass();
  }
};

template <class T>
void find(const Tensor& x, const Tensor& w, const OptionalTensor& b_enc,
          const OptionalTensor& b_dec, const float* floor, Slots<float>& slots) {
  const int64_t n = x.size(0), row = 2 * std::max(round_up(w.size(1), kDimPadding), kDimPadding);
  const int64_t chunk = std::max(kTokenBytes / row / kTokenPadding * kTokenPadding, kTokenPadding);
  for (int64_t first = 0; first < n; first += chunk)
    ThresholdEncoder<T>(x, first, std::min(chunk, n - first), w, b_enc, b_dec, floor, slots).run();
}

// fp64 needs no screen: it is for gradcheck and oracles
template <class T>
void find(const Tensor& x, const Tensor& w, const OptionalTensor& b_enc_,
          const OptionalTensor& b_dec_, const double* floor, Slots<double>& slots) {
  const double *b_enc = data_or_null<double>(b_enc_), *b_dec = data_or_null<double>(b_dec_);
  const int64_t features = w.size(0), d = w.size(1), w0 = w.stride(0), w1 = w.stride(1);
  parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> h(features);
    typename Slots<double>::Part part;
    for (int64_t n = begin; n < end; ++n) {
      const double *row = data<double>(x) + n * x.stride(0), *weights = data<double>(w);
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i)
          sum += (row[i] - (b_dec == nullptr ? 0. : b_dec[i])) * weights[f * w0 + i * w1];
        h[f] = sum + (b_enc == nullptr ? 0. : b_enc[f]);
      }
      part.push_back(above(n, h.data(), floor, features));
    }
    slots.add(std::move(part));
  });
}

std::tuple<Tensor, Tensor, Tensor> threshold_encode(Tensor x, Tensor w, OptionalTensor b_enc,
                                                    OptionalTensor b_dec, Tensor floor) {
  OptionalTensor no_scale;
  x = check_encoder("threshold_encode", x, w, b_enc, b_dec, no_scale);
  const int64_t n = x.size(0);
  check(n < INT32_MAX, "threshold_encode: at most 2^31 - 2 tokens");
  const bool wide = x.scalar_type() == ScalarType::Double;
  check(floor.dim() == 1 && floor.size(0) == w.size(0) &&
            floor.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
        "threshold_encode: floor must be [F], float32 (float64 for float64)");
  floor = torch::stable::contiguous(floor);
  Tensor row_offsets = empty(x, {n + 1}, ScalarType::Long), values, indices;
  MIK_DISPATCH_FLOATING(x, [&] {
    using S = accumulator_t<scalar_t>;
    Slots<S> slots(n);
    find<scalar_t>(x, w, b_enc, b_dec, data<S>(floor), slots);
    const int64_t total = slots.count(mutable_data<int64_t>(row_offsets));
    values = empty(floor, {total});
    indices = empty(x, {total}, ScalarType::Long);
    slots.write(data<int64_t>(row_offsets), mutable_data<S>(values),
                mutable_data<int64_t>(indices));
  });
  return {values, indices, row_offsets};
}

MIK_REGISTER(CPU, m) { m.impl("threshold_encode", TORCH_BOX(&threshold_encode)); }

}  // namespace
}  // namespace mik
