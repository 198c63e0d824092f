// SPDX-License-Identifier: Apache-2.0
// attention_gradients: gradients of softmax(scale q k^T) v, from q, k and v alone.
//
// The queries of the heads that share a head of keys are cut into parts, by the shapes alone. A
// thread takes a part: copies of the keys and values in the accumulator type, and for 64 queries at
// a time all their scores and dP, 512 bytes a key in fp32, which products read from its
// second-level cache (256 KB for 512 keys) or the third. What parts add to dK and dV is added up in
// their order, so results do not depend on the number of threads.
#include "cpu/attention/attention_gradients.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "common.h"
#include "cpu/pairs/row_products.h"
#include "cpu/pairs/scratch.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"

#define MIK_BODY "cpu/attention/attention_gradients_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

// parts that there are at least, where queries are enough for kLeastBlocks blocks each: work for
// many threads, while what a part costs beside its products (copies of keys and values, its sums
// added to others) stays below 3 % of it
constexpr int64_t kParts = 32, kLeastBlocks = 4;

struct Options {
  double scale, softcap, temperature;
  bool causal;
  int64_t window;
};

// an operand or a mask [B|1, H|1, T|1, S] where it lies: asking a tensor takes a call into torch
struct Strides {
  int64_t batch = 0, head = 0, row = 0, inner = 0;

  Strides() = default;

  explicit Strides(const Tensor& of)
      : batch(of.size(0) == 1 ? 0 : of.stride(0)),
        head(of.size(1) == 1 ? 0 : of.stride(1)),
        row(of.size(2) == 1 ? 0 : of.stride(2)),
        inner(of.stride(3)) {}

  int64_t at(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

template <class T>
struct Operand : Strides {
  const T* base;

  explicit Operand(const Tensor& of) : Strides(of), base(data<T>(of)) {}

  // rows as dense ones, `apart` numbers from each other, zeros beyond `cols`
  template <class A>
  void copy(int64_t b, int64_t h, int64_t first, int64_t rows, int64_t cols, int64_t apart,
            A* to) const {
    if (cols == 0) return;
    for (int64_t r = 0; r < rows; ++r, to += apart) {
      copy_row(base + at(b, h, first + r), inner, static_cast<const T*>(nullptr), 0, cols, to);
      std::fill(to + cols, to + apart, A(0));
    }
  }
};

// of parts, added up in their order whenever the next one is there
template <class A>
class OrderedSums {
 public:
  struct Sum {
    Scratch<A> numbers;
    int64_t count = 0;
  };

  OrderedSums(int64_t places, int64_t parts) : places_(places), parts_(parts) {}

  Sum take() {
    const std::lock_guard<std::mutex> guard(free_lock_);
    if (free_.empty()) return {};
    Sum sum = std::move(free_.back());
    free_.pop_back();
    return sum;
  }

  // the sum of a part, of which the first `count` numbers may be other than 0. `finish` is called
  // with that of all parts, once
  template <class F>
  void add(int64_t place, int64_t part, Sum sum, const F& finish) {
    Place& at = places_[place];
    const std::lock_guard<std::mutex> guard(at.lock);
    at.waiting.emplace(part, std::move(sum));
    for (auto next = at.waiting.begin(); next != at.waiting.end() && next->first == at.added;
         next = at.waiting.begin()) {
      if (at.added == 0) {
        at.total = std::move(next->second);
      } else {
        A* const to = at.total.numbers.data();
        const A* const from = next->second.numbers.data();
        MIK_AT_LEVEL(add_numbers<A>)(from, next->second.count, to);
        give_back(std::move(next->second));
      }
      at.waiting.erase(next);
      ++at.added;
    }
    if (at.added < parts_) return;
    finish(at.total.numbers.data());
    give_back(std::move(at.total));
  }

 private:
  struct Place {
    std::mutex lock;
    int64_t added = 0;
    Sum total;
    std::map<int64_t, Sum> waiting;
  };

  void give_back(Sum sum) {
    const std::lock_guard<std::mutex> guard(free_lock_);
    free_.push_back(std::move(sum));
  }

  std::vector<Place> places_;
  int64_t parts_;
  std::mutex free_lock_;
  std::vector<Sum> free_;
};

template <class T>
class Gradients {
 public:
  using A = accumulator_t<T>;

  Gradients(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& out, const OptionalTensor& keep, const OptionalTensor& bias,
            const Options& options, T* dq, T* dk, T* dv, A* checks)
      : grad_(grad),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        keep_(keep),
        bias_(bias),
        keep_at_(keep.has_value() ? Strides(*keep) : Strides()),
        bias_at_(bias.has_value() ? Strides(*bias) : Strides()),
        options_(options),
        dq_(dq),
        dk_(dk),
        dv_(dv),
        checks_(checks),
        heads_(q.size(1)),
        shared_(k.size(1)),
        group_(heads_ / shared_),
        queries_(q.size(2)),
        keys_(k.size(2)),
        e_(q.size(3)),
        f_(v.size(3)),
        qk_(row_of(e_)),
        vo_(row_of(f_)),
        head_blocks_((queries_ + kQueries - 1) / kQueries),
        blocks_(head_blocks_ * group_),
        places_(k.size(0) * shared_),
        first_blocks_(cut()),
        parts_(static_cast<int64_t>(first_blocks_.size()) - 1),
        sums_(places_, parts_) {}

  void run() {
    std::atomic<int64_t> taken{0};
    const int64_t parts = places_ * parts_;
    const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), parts);
    parallel(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Worker worker;
        for (int64_t i = taken.fetch_add(1); i < parts; i = taken.fetch_add(1))
          add_part(worker, i / parts_, i % parts_);
      }
    });
  }

 private:
  struct Reach {
    int64_t begin, end;
  };

  // the keys that queries from `first` on may attend to
  Reach reach(int64_t first) const {
    const int64_t last = std::min(first + kQueries, queries_);
    const int64_t begin = options_.window > 0
                              ? std::max<int64_t>(first - options_.window + 1, 0) / kStrip * kStrip
                              : 0;
    const int64_t end = options_.causal ? std::min(keys_, last) : keys_;
    return {std::min(begin, end), end};
  }

  // the blocks of a head of keys in parts of about as many keys
  std::vector<int64_t> cut() const {
    const int64_t parts = std::clamp((kParts + places_ - 1) / std::max<int64_t>(places_, 1),
                                     int64_t{1}, std::max<int64_t>(blocks_ / kLeastBlocks, 1));
    const auto keys = [&](int64_t block) {
      const Reach found = reach(block % head_blocks_ * kQueries);
      return found.end - found.begin;
    };
    int64_t total = 0, met = 0;
    for (int64_t i = 0; i < blocks_; ++i) total += keys(i);
    std::vector<int64_t> first{0};
    for (int64_t i = 0; i < blocks_; ++i) {
      if (met * parts >= total * static_cast<int64_t>(first.size()) && met > 0) first.push_back(i);
      met += keys(i);
    }
    first.push_back(blocks_);
    return first;
  }

  static int64_t in_strips(int64_t rows) { return (rows + kStrip - 1) / kStrip * kStrip; }

  // memory of a thread
  struct Worker {
    int64_t place = -1;
    Scratch<A> k, v, largest, q, grad, given, q_across, grad_across;
    Scratch<A> scores, dp, slope, tempered, added, lying, dq, out;
    A statistics[kStatistics * kQueries];
    std::vector<KeyChunk> chunks;
  };

  void take_keys(Worker& worker, int64_t place) {
    if (worker.place == place) return;
    worker.place = place;
    const int64_t b = place / shared_, g = place % shared_;
    k_.copy(b, g, 0, keys_, e_, qk_, worker.k.take(keys_ * qk_));
    A* const v = worker.v.take(keys_ * vo_);
    v_.copy(b, g, 0, keys_, f_, vo_, v);
    MIK_AT_LEVEL(column_sizes<A>)(v, vo_, keys_, vo_, worker.largest.take(vo_));
  }

  void add_part(Worker& worker, int64_t place, int64_t part) {
    take_keys(worker, place);
    auto sum = sums_.take();
    const int64_t count = keys_ * (qk_ + vo_);
    A *const dk = sum.numbers.take(count), *const dv = dk + keys_ * qk_;
    sum.count = count;
    std::fill(dk, dk + count, A(0));
    for (int64_t i = first_blocks_[part]; i < first_blocks_[part + 1]; ++i) {
      const int64_t head = place % shared_ * group_ + i / head_blocks_;
      add_block(worker, place / shared_, head, i % head_blocks_ * kQueries, dk, dv);
    }
    sums_.add(place, part, std::move(sum), [&](const A* total) {
      MIK_AT_LEVEL(write_rows<A, T>)(total, qk_, keys_, e_, A(options_.scale),
                                     dk_ + place * keys_ * e_);
      MIK_AT_LEVEL(write_rows<A, T>)(total + keys_ * qk_, vo_, keys_, f_, A(1),
                                     dv_ + place * keys_ * f_);
    });
  }

  // masks of a chunk, [keys, kQueries]: what is added, -inf where a query may not attend. False if
  // none of them may
  bool mask(Worker& worker, int64_t b, int64_t h, int64_t first, int64_t rows,
            const KeyChunk& chunk) const {
    A* const to = worker.added.take(kKeys * kQueries);
    // by query, as masks lie; one row is that of all queries
    A* const lying = worker.lying.take(kQueries * kKeys);
    const bool same = bias_at_.row == 0 && keep_at_.row == 0;
    const int64_t own = same ? 1 : rows;
    std::fill(lying, lying + in_strips(rows) * kKeys, A(0));
    if (bias_.has_value()) {
      const int64_t start = bias_at_.at(b, h, first) + chunk.key * bias_at_.inner;
      MIK_DISPATCH_FLOATING(*bias_, [&] {
        MIK_AT_LEVEL(take_bias<A, scalar_t>)(data<scalar_t>(*bias_) + start, bias_at_.row,
                                             bias_at_.inner, own, chunk.count, lying);
      });
    }
    if (keep_.has_value()) {
      const int64_t start = keep_at_.at(b, h, first) + chunk.key * keep_at_.inner;
      MIK_AT_LEVEL(take_keep<A>)(data<uint8_t>(*keep_) + start, keep_at_.row, keep_at_.inner, own,
                                 chunk.count, lying);
    }
    if (!MIK_AT_LEVEL(any_kept<A>)(lying, own, chunk.count)) return false;
    if (same) {
      for (int64_t j = 0; j < chunk.count; ++j)
        std::fill(to + j * kQueries, to + (j + 1) * kQueries, lying[j]);
    } else {
      MIK_AT_LEVEL(across<A>)(lying, kKeys, in_strips(rows), chunk.count, to);
    }
    return true;
  }

  void add_block(Worker& worker, int64_t b, int64_t h, int64_t first, A* dk, A* dv) {
    const int64_t rows = std::min(kQueries, queries_ - first);
    A *const q = worker.q.take(kQueries * qk_), *const grad = worker.grad.take(kQueries * vo_);
    A* const q_across = worker.q_across.take(qk_ * kQueries);
    A* const grad_across = worker.grad_across.take(vo_ * kQueries);
    q_.copy(b, h, first, rows, e_, qk_, q);
    grad_.copy(b, h, first, rows, f_, vo_, grad);
    // queries that are not there only share vectors with others
    const int64_t whole = in_strips(rows);
    std::fill(q + rows * qk_, q + whole * qk_, A(0));
    std::fill(grad + rows * vo_, grad + whole * vo_, A(0));
    MIK_AT_LEVEL(across<A>)(q, qk_, whole, e_, q_across);
    MIK_AT_LEVEL(across<A>)(grad, vo_, whole, f_, grad_across);

    const auto [begin, end] = reach(first);
    const int64_t most = (end - begin) * kQueries;
    A* const statistics = worker.statistics;
    std::fill(statistics, statistics + kStatistics * kQueries, A(0));
    std::fill(statistics + kMost * kQueries, statistics + (kMost + 1) * kQueries,
              -std::numeric_limits<A>::infinity());
    A *const dq = worker.dq.take(kQueries * qk_), *const out = worker.out.take(kQueries * vo_);
    std::fill(dq, dq + rows * qk_, A(0));
    std::fill(out, out + rows * vo_, A(0));
    const bool tempered = options_.temperature != 1 && options_.temperature != 2;
    const AttentionBlock<A> block{.rows = rows,
                                  .first_row = first,
                                  .e = e_,
                                  .f = f_,
                                  .qk = qk_,
                                  .vo = vo_,
                                  .scale = static_cast<A>(options_.scale),
                                  .softcap = static_cast<A>(options_.softcap),
                                  .temperature = static_cast<A>(options_.temperature),
                                  .causal = options_.causal,
                                  .window = options_.window,
                                  .q = q,
                                  .grad = grad,
                                  .q_across = q_across,
                                  .grad_across = grad_across,
                                  .k = worker.k.data(),
                                  .v = worker.v.data(),
                                  .scores = worker.scores.take(most),
                                  .dp = worker.dp.take(most),
                                  .slope = options_.softcap > 0 ? worker.slope.take(most) : nullptr,
                                  .tempered = tempered ? worker.tempered.take(most) : nullptr,
                                  .statistics = statistics,
                                  .dq = dq,
                                  .out = out,
                                  .dk = dk,
                                  .dv = dv};

    const bool masked = keep_.has_value() || bias_.has_value();
    int64_t live = 0;
    worker.chunks.clear();
    for (int64_t key = begin; key < end; key += kKeys) {
      const KeyChunk chunk{key, std::min(kKeys, end - key), live};
      if (masked && !mask(worker, b, h, first, rows, chunk)) continue;
      MIK_AT_LEVEL(attention_scores<A>)(block, chunk, masked ? worker.added.data() : nullptr);
      worker.chunks.push_back(chunk);
      live += chunk.count;
    }
    MIK_AT_LEVEL(attention_weights<A>)(block, worker.chunks.data(), worker.chunks.size());
    for (const KeyChunk& chunk : worker.chunks) MIK_AT_LEVEL(attention_sums<A>)(block, chunk);

    const int64_t row = (b * heads_ + h) * queries_ + first;
    MIK_AT_LEVEL(write_rows<A, T>)(dq, qk_, rows, e_, block.scale, dq_ + row * e_);
    A* const given = worker.given.take(kQueries * vo_);
    out_.copy(b, h, first, rows, f_, vo_, given);
    A* to = checks_ + row * 4;
    for (int64_t r = 0; r < rows; ++r, to += 4) {
      const auto statistic = [&](int which) { return statistics[which * kQueries + r]; };
      to[0] = keys_ == 0 ? A(0)
                         : MIK_AT_LEVEL(distance<A>)(out + r * vo_, given + r * vo_,
                                                     worker.largest.data(), vo_);
      to[1] = f_ > 0 ? statistic(kRawMost) : A(0);
      to[2] = statistic(kChange);
      to[3] = statistic(kPlain);
    }
  }

  const Operand<T> grad_, q_, k_, v_, out_;
  const OptionalTensor &keep_, &bias_;
  const Strides keep_at_, bias_at_;
  const Options options_;
  T *const dq_, *const dk_, *const dv_;
  A* const checks_;
  const int64_t heads_, shared_, group_, queries_, keys_, e_, f_, qk_, vo_;
  // of a head; of a head of keys; heads of keys in all
  const int64_t head_blocks_, blocks_, places_;
  // of a part, with the end of the last
  const std::vector<int64_t> first_blocks_;
  const int64_t parts_;
  OrderedSums<A> sums_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_gradients(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, OptionalTensor keep, OptionalTensor bias,
    double scale, double softcap, bool causal, int64_t window, double temperature) {
  const auto is = [&](const Tensor& t, int64_t heads, int64_t rows, int64_t cols) {
    return t.dim() == 4 && t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) &&
           t.size(1) == heads && t.size(2) == rows && t.size(3) == cols;
  };
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && is(k, k.size(1), k.size(2), q.size(3)) &&
            is(v, k.size(1), k.size(2), v.size(3)) && is(grad, q.size(1), q.size(2), v.size(3)) &&
            is(out, q.size(1), q.size(2), v.size(3)),
        "attention_gradients: expected q [B, H, T, e], k [B, G, S, e], v [B, G, S, f], grad and "
        "out [B, H, T, f] of one dtype");
  check(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
        "attention_gradients: k must have heads of which H is a multiple");
  for (const OptionalTensor* mask : {&keep, &bias}) {
    if (!mask->has_value()) continue;
    const Tensor& m = **mask;
    check(m.dim() == 4 && m.size(3) == k.size(2), "attention_gradients: masks must be [.., S]");
    for (int axis = 0; axis < 3; ++axis)
      check(m.size(axis) == 1 || m.size(axis) == q.size(axis),
            "attention_gradients: masks must be [B|1, H|1, T|1, S]");
  }
  check(!keep.has_value() || keep->scalar_type() == ScalarType::Bool,
        "attention_gradients: keep must be bool");
  check(window >= 0, "attention_gradients: window must be at least 0");
  const auto like = [&](const Tensor& t) {
    return empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const auto acc = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor checks = empty(q, {q.size(0), q.size(1), q.size(2), 4}, acc);
  MIK_DISPATCH_FLOATING(q, [&] {
    using T = scalar_t;
    Gradients<T>(grad, q, k, v, out, keep, bias, {scale, softcap, temperature, causal, window},
                 mutable_data<T>(dq), mutable_data<T>(dk), mutable_data<T>(dv),
                 mutable_data<accumulator_t<T>>(checks))
        .run();
  });
  return {dq, dk, dv, checks};
}

MIK_REGISTER(CPU, m) { m.impl("attention_gradients", TORCH_BOX(&attention_gradients)); }

}  // namespace
}  // namespace mik
