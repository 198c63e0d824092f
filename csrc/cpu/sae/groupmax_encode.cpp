// SPDX-License-Identifier: Apache-2.0
// groupmax_encode: the best of each group of consecutive features; the method is in
// mikernels/ops/sae/groupmax_encode.py and encode.py. encode_panels.h packs and deals out the work,
// encode_body.h screens, candidates.h selects.
#include "common.h"
#include "cpu/sae/encode.h"
#include "cpu/screen/candidates.h"

#define MIK_BODY "cpu/sae/encode_body.h"
#include "cpu/simd/each_screen_level.h"

#include "cpu/sae/encode_panels.h"

namespace mik {
namespace {

// what is below nothing: the bounds of a tile of tokens at the first feature of a group
alignas(64) constexpr float kNothing[kTileTokens] = {
    -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
    -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity};

template <class S>
int64_t first_best(const S* scores, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i)
    if (rank_key(scores[i]) > rank_key(scores[best])) best = i;
  return best;
}

template <class T, class S>
T clamped(S h, bool relu) {
  return static_cast<T>(relu && h <= 0 ? S(0) : h);
}

// room for the winners of all groups and, of groups that 16 bits leave undecided, three times as
// many others
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
class GroupEncoder : EncodePanels<T> {
 public:
  // tokens first..first + count of x
  GroupEncoder(const Tensor& x, int64_t first, int64_t count, const Tensor& w,
               const OptionalTensor& b_enc, const OptionalTensor& b_dec,
               const OptionalTensor& scale, int64_t k)
      : EncodePanels<T>(x, first, count, w, b_enc, b_dec, scale, false),
        k_(k),
        group_(features_ / k),
        capacity_(list_capacity(k, features_)) {}

  void run(T* values, int64_t* indices, bool relu) {
    if (this->is_direct()) return direct(values, indices, relu);
    candidates_.reset(new Candidate[tokens_ * capacity_]);
    sizes_.reset(new int32_t[tokens_]());
    open_.reset(new int32_t[tokens_]());
    opens_.reset(new bool[features_]());
    for (int64_t f = 0; f < features_; f += group_) opens_[f] = true;
    Lists lists{*this};
    this->each_panel(
        [&](const Panel& panel, const Tokens& tokens, int64_t begin, int64_t end, int64_t block) {
          for (int64_t tile = begin; tile < end; tile += block)
            MIK_SCREEN(screen<Lists>)(panel, tokens, tile, std::min(tile + block, end), lists);
          if (transposed_)  // this panel's fp32 rows are about to be overwritten
            for (int64_t n = begin * kTileTokens; n < std::min(end * kTileTokens, tokens_); ++n)
              settle_token(n);
        },
        [] {});
    parallel(tokens_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        settle_token(n);
        write(candidates_.get() + n * capacity_, values + n * k_, indices + n * k_, relu);
      }
    });
  }

 private:
  using EncodePanels<T>::tokens_, EncodePanels<T>::features_, EncodePanels<T>::d_,
      EncodePanels<T>::transposed_, EncodePanels<T>::tau_;

  // A token's candidates, by group: those of its open group, whose features are passing, begin at
  // open_; of earlier groups those that could not be told apart are left
  struct Lists {
    GroupEncoder& encoder;

    // a group's first feature is always added, which opens the group
    static constexpr bool kFloors = false, kStrict = false;

    const float* bounds(const Tokens& tokens, int64_t feature, int64_t n) const {
      return encoder.opens_[feature] ? kNothing : tokens.tau + n;
    }

    // not inlined: the products around it would lose their registers, as in batch_topk_encode
    __attribute__((noinline)) void add(int64_t token, int64_t feature, float score, float slack) {
      encoder.add(token, {score, slack, 0.f, static_cast<int32_t>(feature)});
    }
  };

  const int64_t k_, group_, capacity_;
  std::unique_ptr<Candidate[]> candidates_;
  std::unique_ptr<int32_t[]> sizes_, open_;
  std::unique_ptr<bool[]> opens_;

  void add(int64_t token, const Candidate& candidate) {
    Candidate* list = candidates_.get() + token * capacity_;
    int32_t& size = sizes_[token];
    float& tau = tau_[token];
    if (opens_[candidate.feature]) {
      drop_beaten(token);
      open_[token] = size;
      tau = -kInfinity;
    }
    tau = std::max(tau, lower_bound(candidate));
    // most candidates are certain to beat the one before
    while (size > open_[token] && !may_reach(list[size - 1], tau)) --size;
    list[size++] = candidate;
    if (size == capacity_) make_room(token);
  }

  // what cannot win the open group leaves it
  void drop_beaten(int64_t token) {
    Candidate* list = candidates_.get() + token * capacity_;
    const float bound = tau_[token];
    Candidate* end = list + sizes_[token];
    sizes_[token] = static_cast<int32_t>(
        std::remove_if(list + open_[token], end,
                       [&](const Candidate& c) { return !may_reach(c, bound); }) -
        list);
  }

  void make_room(int64_t token) {
    drop_beaten(token);
    // bounds too wide to separate the candidates: spend the exact scores now
    if (sizes_[token] > capacity_ - capacity_ / 4) settle_token(token);
  }

  Candidate scored(const double* x, int64_t f) const {
    const auto [score, value] = this->exact(x, f);
    return {score, -1, value, static_cast<int32_t>(f)};
  }

  // one exact candidate a group is left
  void settle_token(int64_t token) {
    static thread_local std::vector<double> x;
    x.resize(d_);
    this->centred(token, x.data());
    Candidate* list = candidates_.get() + token * capacity_;
    int64_t kept = 0;
    for (int64_t begin = 0, end = 0; begin < sizes_[token]; begin = end) {
      const int64_t next_group = (list[begin].feature / group_ + 1) * group_;
      while (end < sizes_[token] && list[end].feature < next_group) ++end;
      float tau = -kInfinity;
      settle(list + begin, end - begin, 1, &tau,
             [&](Candidate& c) { c = scored(x.data(), c.feature); });
      list[kept++] = list[begin];
    }
    sizes_[token] = static_cast<int32_t>(kept);
    // the last group is the open one
    open_[token] = static_cast<int32_t>(kept - 1);
    tau_[token] = std::max(tau_[token], lower_bound(list[kept - 1]));
  }

  // few tokens: every score exactly, threads over the features
  void direct(T* values, int64_t* indices, bool relu) {
    std::unique_ptr<double[]> x(new double[tokens_ * d_]);
    std::unique_ptr<float[]> scores(new float[tokens_ * features_]);
    for (int64_t n = 0; n < tokens_; ++n) this->centred(n, x.get() + n * d_);
    parallel(features_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f)
        for (int64_t n = 0; n < tokens_; ++n)
          scores[n * features_ + f] = this->exact(x.get() + n * d_, f).score;
    });
    std::vector<Candidate> winners(k_);
    for (int64_t n = 0; n < tokens_; ++n) {
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t first = j * group_;
        const int64_t best = first + first_best(scores.get() + n * features_ + first, group_);
        winners[j] = scored(x.get() + n * d_, best);
      }
      write(winners.data(), values + n * k_, indices + n * k_, relu);
    }
  }

  void write(const Candidate* winners, T* values, int64_t* indices, bool relu) const {
    for (int64_t j = 0; j < k_; ++j) {
      values[j] = clamped<T>(winners[j].value, relu);
      indices[j] = winners[j].feature;
    }
  }
};

// fp64 needs no screen: it is for gradcheck and oracles
void groupmax_double(const Tensor& x, const Tensor& w, const double* b_enc, const double* b_dec,
                     const double* scale, int64_t k, bool relu, double* values, int64_t* indices) {
  const int64_t d = w.size(1), group = w.size(0) / k, w0 = w.stride(0), w1 = w.stride(1);
  parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> h(group), ranked(group);
    for (int64_t n = begin; n < end; ++n) {
      const double *row = data<double>(x) + n * x.stride(0), *weights = data<double>(w);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t i = 0; i < group; ++i) {
          const int64_t f = j * group + i;
          double sum = 0;
          for (int64_t c = 0; c < d; ++c)
            sum += (row[c] - (b_dec == nullptr ? 0. : b_dec[c])) * weights[f * w0 + c * w1];
          h[i] = sum + (b_enc == nullptr ? 0. : b_enc[f]);
          ranked[i] = scale == nullptr ? h[i] : h[i] * scale[f];
        }
        const int64_t best = first_best(ranked.data(), group);
        values[n * k + j] = clamped<double>(h[best], relu);
        indices[n * k + j] = j * group + best;
      }
    }
  });
}

std::tuple<Tensor, Tensor> groupmax_encode(Tensor x, Tensor w, OptionalTensor b_enc,
                                           OptionalTensor b_dec, OptionalTensor scale, int64_t k,
                                           bool relu) {
  x = check_encoder("groupmax_encode", x, w, b_enc, b_dec, scale);
  check(k >= 1 && k <= w.size(0) && w.size(0) % k == 0,
        "groupmax_encode: k must be in 1..F and divide F");
  const int64_t n = x.size(0);
  Tensor values = empty(x, {n, k}), indices = empty(x, {n, k}, ScalarType::Long);
  if (n == 0) return {values, indices};
  MIK_DISPATCH_FLOATING(x, [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      groupmax_double(x, w, data_or_null<double>(b_enc), data_or_null<double>(b_dec),
                      data_or_null<double>(scale), k, relu, mutable_data<double>(values),
                      mutable_data<int64_t>(indices));
    } else {
      const int64_t chunk = tokens_a_chunk(k, w.size(0), w.size(1));
      for (int64_t first = 0; first < n; first += chunk)
        GroupEncoder<scalar_t>(x, first, std::min(chunk, n - first), w, b_enc, b_dec, scale, k)
            .run(mutable_data<scalar_t>(values) + first * k,
                 mutable_data<int64_t>(indices) + first * k, relu);
    }
  });
  return {values, indices};
}

MIK_REGISTER(CPU, m) { m.impl("groupmax_encode", TORCH_BOX(&groupmax_encode)); }

}  // namespace
}  // namespace mik
