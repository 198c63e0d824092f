// SPDX-License-Identifier: Apache-2.0
// attention_gradients: gradients of softmax(scale q k^T) v, from q, k and v alone.
//
// The queries of the heads that share a head of keys are cut into parts, whose number depends on
// the shapes only. A thread takes a part: copies of the keys and values, and for 64 queries at a
// time all their scores, [S, 64] of S and of dP, which the products read while they are in its
// second-level cache (256 KB for 512 keys). What parts add to dK and dV is added up in their
// order, so results do not depend on the number of threads.
#include "cpu/attention/attention_gradients.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "common.h"
#include "cpu/pairs/scratch.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"

#define MIK_BODY "cpu/attention/attention_gradients_body.h"
#include "cpu/simd/each_level.h"

namespace mik {

#define MIK_ATTENTION(A)                                                                       \
  void attention_scores(const AttentionBlock<A>& of, const KeyChunk& chunk, const A* added) {  \
    MIK_AT_LEVEL(attention_scores<A>)(of, chunk, added);                                       \
  }                                                                                            \
  void attention_weights(const AttentionBlock<A>& of, int64_t keys) {                          \
    MIK_AT_LEVEL(attention_weights<A>)(of, keys);                                              \
  }                                                                                            \
  void attention_sums(const AttentionBlock<A>& of, const KeyChunk& chunk) {                    \
    MIK_AT_LEVEL(attention_sums<A>)(of, chunk);                                                \
  }                                                                                            \
  void across(const A* from, int64_t row, int64_t rows, int64_t cols, A* to) {                 \
    MIK_AT_LEVEL(across<A>)(from, row, rows, cols, to);                                        \
  }

MIK_ATTENTION(float)
MIK_ATTENTION(double)

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

// a mask [B|1, H|1, T|1, S] where it lies
struct Strides {
  int64_t batch, head, query, key;

  explicit Strides(const Tensor& of)
      : batch(of.size(0) == 1 ? 0 : of.stride(0)),
        head(of.size(1) == 1 ? 0 : of.stride(1)),
        query(of.size(2) == 1 ? 0 : of.stride(2)),
        key(of.stride(3)) {}
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
    for (auto next = at.waiting.begin();
         next != at.waiting.end() && next->first == at.added; next = at.waiting.begin()) {
      if (at.added == 0) {
        at.total = std::move(next->second);
      } else {
        A* const to = at.total.numbers.data();
        const A* const from = next->second.numbers.data();
        for (int64_t i = 0; i < next->second.count; ++i) to[i] += from[i];
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

// to[i] = the row's numbers, `stride` apart, zeros from `count` to `whole`
template <class T, class A>
void copy_row(const T* from, int64_t stride, int64_t count, int64_t whole, A* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i * stride]);
  std::fill(to + count, to + whole, A(0));
}

template <class A, class T>
void add_bias(const T* from, int64_t query, int64_t key, int64_t rows, int64_t keys, A* to) {
  if (query == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const A value = static_cast<A>(from[j * key]);
      for (int64_t r = 0; r < kQueries; ++r) to[j * kQueries + r] = value;
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < keys; ++j)
      to[j * kQueries + r] = static_cast<A>(from[r * query + j * key]);
}

template <class T>
class Gradients {
 public:
  using A = accumulator_t<T>;

  Gradients(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& out, const OptionalTensor& keep, const OptionalTensor& bias,
            const Options& options, const Tensor& dq, const Tensor& dk, const Tensor& dv,
            const Tensor& checks)
      : grad_(grad), q_(q), k_(k), v_(v), out_(out), keep_(keep), bias_(bias), options_(options),
        dq_(dq), dk_(dk), dv_(dv), checks_(checks), heads_(q.size(1)), shared_(k.size(1)),
        group_(heads_ / shared_), queries_(q.size(2)), keys_(k.size(2)), e_(q.size(3)),
        f_(v.size(3)), qk_(row_of(e_)), vo_(row_of(f_)),
        blocks_((queries_ + kQueries - 1) / kQueries * group_),
        places_(k.size(0) * shared_),
        parts_(std::clamp((kParts + places_ - 1) / std::max<int64_t>(places_, 1), int64_t{1},
                          std::max<int64_t>(blocks_ / kLeastBlocks, 1))),
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
  // memory of a thread
  struct Worker {
    int64_t place = -1;
    Scratch<A> k, v, largest, q, grad, q_across, grad_across;
    Scratch<A> scores, dp, slope, tempered, added, dq, out;
    A statistics[kStatistics * kQueries];
    std::vector<KeyChunk> chunks;
  };

  static const T* at(const Tensor& of, int64_t b, int64_t h) {
    return data<T>(of) + b * of.stride(0) + h * of.stride(1);
  }

  void take_keys(Worker& worker, int64_t place) {
    if (worker.place == place) return;
    worker.place = place;
    const int64_t b = place / shared_, g = place % shared_;
    A *const k = worker.k.take(keys_ * qk_), *const v = worker.v.take(keys_ * vo_);
    A* const largest = worker.largest.take(f_);
    std::fill(largest, largest + f_, A(0));
    for (int64_t j = 0; j < keys_; ++j) {
      copy_row(at(k_, b, g) + j * k_.stride(2), k_.stride(3), e_, qk_, k + j * qk_);
      A* const row = v + j * vo_;
      copy_row(at(v_, b, g) + j * v_.stride(2), v_.stride(3), f_, vo_, row);
      for (int64_t c = 0; c < f_; ++c) largest[c] = larger(largest[c], std::abs(row[c]));
    }
  }

  // NaN is the largest
  static A larger(A a, A b) { return b > a || b != b ? b : a; }

  void add_part(Worker& worker, int64_t place, int64_t part) {
    take_keys(worker, place);
    auto sum = sums_.take();
    A* const dk = sum.numbers.take(keys_ * (qk_ + vo_));
    std::fill(dk, dk + keys_ * (qk_ + vo_), A(0));
    sum.count = keys_ * (qk_ + vo_);
    const int64_t of_head = (queries_ + kQueries - 1) / kQueries;
    for (int64_t i = part * blocks_ / parts_; i < (part + 1) * blocks_ / parts_; ++i) {
      const int64_t head = place % shared_ * group_ + i / of_head;
      add_block(worker, place / shared_, head, i % of_head * kQueries, dk, dk + keys_ * qk_);
    }
    sums_.add(place, part, std::move(sum), [&](const A* total) {
      write(total, qk_, A(options_.scale), mutable_data<T>(dk_) + place * keys_ * e_, keys_, e_);
      write(total + keys_ * qk_, vo_, A(1), mutable_data<T>(dv_) + place * keys_ * f_, keys_, f_);
    });
  }

  static void write(const A* from, int64_t row, A scale, T* to, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        to[r * cols + c] = static_cast<T>(scale * from[r * row + c]);
  }

  // rows of a head's queries or gradients, as they are and across
  static void take_rows(const Tensor& of, int64_t b, int64_t h, int64_t first, int64_t rows,
                        int64_t cols, int64_t row, A* to, A* across_to) {
    const T* const from = at(of, b, h) + first * of.stride(2);
    for (int64_t r = 0; r < rows; ++r)
      copy_row(from + r * of.stride(2), of.stride(3), cols, row, to + r * row);
    if (rows < kQueries) std::fill(across_to, across_to + cols * kQueries, A(0));
    across(to, row, rows, cols, across_to);
  }

  // masks of a chunk, [keys, kQueries]: what is added, -inf where a query may not attend. False if
  // none of them may
  bool mask(int64_t b, int64_t h, int64_t first, int64_t rows, const KeyChunk& chunk, A* to) const {
    constexpr A none = -std::numeric_limits<A>::infinity();
    if (rows < kQueries || !bias_.has_value()) std::fill(to, to + chunk.count * kQueries, A(0));
    if (bias_.has_value()) {
      const Strides at(*bias_);
      const int64_t start = b * at.batch + h * at.head + first * at.query + chunk.key * at.key;
      MIK_DISPATCH_FLOATING(*bias_, [&] {
        add_bias(data<scalar_t>(*bias_) + start, at.query, at.key, rows, chunk.count, to);
      });
    }
    if (keep_.has_value()) {
      const Strides at(*keep_);
      const bool* const start = data<bool>(*keep_) + b * at.batch + h * at.head +
                                first * at.query + chunk.key * at.key;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < chunk.count; ++j)
          if (!start[r * at.query + j * at.key]) to[j * kQueries + r] = none;
    }
    bool any = false;
    for (int64_t j = 0; j < chunk.count; ++j)
      for (int64_t r = 0; r < rows; ++r) any |= to[j * kQueries + r] != none;
    return any;
  }

  void add_block(Worker& worker, int64_t b, int64_t h, int64_t first, A* dk, A* dv) {
    const int64_t rows = std::min(kQueries, queries_ - first);
    AttentionBlock<A> block;
    block.rows = rows;
    block.first_row = first;
    block.e = e_, block.f = f_, block.qk = qk_, block.vo = vo_;
    block.scale = static_cast<A>(options_.scale);
    block.softcap = static_cast<A>(options_.softcap);
    block.temperature = static_cast<A>(options_.temperature);
    block.causal = options_.causal, block.window = options_.window;
    block.k = worker.k.data(), block.v = worker.v.data();
    block.dk = dk, block.dv = dv;
    A *const q = worker.q.take(kQueries * qk_), *const grad = worker.grad.take(kQueries * vo_);
    A* const q_across = worker.q_across.take(e_ * kQueries);
    A* const grad_across = worker.grad_across.take(f_ * kQueries);
    take_rows(q_, b, h, first, rows, e_, qk_, q, q_across);
    take_rows(grad_, b, h, first, rows, f_, vo_, grad, grad_across);
    block.q = q, block.grad = grad, block.q_across = q_across, block.grad_across = grad_across;
    // queries and keys at their own numbers: what is not in reach of the block is not met
    const int64_t end = options_.causal ? std::min(keys_, first + rows) : keys_;
    const int64_t begin = options_.window > 0 ? std::max<int64_t>(0, first - options_.window + 1) : 0;
    const int64_t most = std::max<int64_t>(end - begin, 0) * kQueries;
    block.scores = worker.scores.take(most);
    block.dp = worker.dp.take(most);
    block.slope = options_.softcap > 0 ? worker.slope.take(most) : nullptr;
    const bool own = options_.temperature != 1 && options_.temperature != 2;
    block.tempered = own ? worker.tempered.take(most) : nullptr;
    block.statistics = worker.statistics;
    std::fill(worker.statistics, worker.statistics + kStatistics * kQueries, A(0));
    std::fill(worker.statistics + kMost * kQueries, worker.statistics + (kMost + 1) * kQueries,
              -std::numeric_limits<A>::infinity());
    block.dq = worker.dq.take(kQueries * qk_);
    block.out = worker.out.take(kQueries * vo_);
    std::fill(block.dq, block.dq + kQueries * qk_, A(0));
    std::fill(block.out, block.out + kQueries * vo_, A(0));
    const bool masked = keep_.has_value() || bias_.has_value();
    A* const added = masked ? worker.added.take(kKeys * kQueries) : nullptr;

    int64_t live = 0;
    worker.chunks.clear();
    for (int64_t key = begin; key < end; key += kKeys) {
      const KeyChunk chunk{key, std::min(kKeys, end - key), live};
      if (masked && !mask(b, h, first, rows, chunk, added)) continue;
      attention_scores(block, chunk, added);
      worker.chunks.push_back(chunk);
      live += chunk.count;
    }
    attention_weights(block, live);
    for (const KeyChunk& chunk : worker.chunks) attention_sums(block, chunk);

    const int64_t row = (b * heads_ + h) * queries_ + first;
    write(block.dq, qk_, block.scale, mutable_data<T>(dq_) + row * e_, rows, e_);
    check(worker, block, b, h, mutable_data<A>(checks_) + row * 4);
  }

  void check(Worker& worker, const AttentionBlock<A>& block, int64_t b, int64_t h,
             A* to) const {
    const T* const out = at(out_, b, h) + block.first_row * out_.stride(2);
    const A* const largest = worker.largest.data();
    for (int64_t r = 0; r < block.rows; ++r, to += 4) {
      A distance = 0;
      for (int64_t c = 0; c < f_ && keys_ > 0; ++c) {
        const A found = block.out[r * vo_ + c];
        const A given = static_cast<A>(out[r * out_.stride(2) + c * out_.stride(3)]);
        // 0 / 0: a column of zeros that gave zero
        if (found != given) distance = larger(distance, std::abs(found - given) / largest[c]);
      }
      const auto statistic = [&](int which) { return block.statistics[which * kQueries + r]; };
      to[0] = distance;
      to[1] = f_ > 0 ? statistic(kRawMost) : A(0);
      to[2] = statistic(kChange);
      to[3] = statistic(kPlain);
    }
  }

  const Tensor &grad_, &q_, &k_, &v_, &out_;
  const OptionalTensor &keep_, &bias_;
  const Options options_;
  const Tensor &dq_, &dk_, &dv_, &checks_;
  const int64_t heads_, shared_, group_, queries_, keys_, e_, f_, qk_, vo_;
  // of a head of keys; of keys' heads in all; of a head of keys
  const int64_t blocks_, places_, parts_;
  OrderedSums<A> sums_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_gradients(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, OptionalTensor keep, OptionalTensor bias,
    double scale, double softcap, bool causal, int64_t window, double temperature) {
  const auto is = [&](const Tensor& t, int64_t heads, int64_t rows, int64_t cols) {
    return t.dim() == 4 && t.scalar_type() == q.scalar_type() && t.size(0) == q.size(0) &&
           t.size(1) == heads && t.size(2) == rows && t.size(3) == cols;
  };
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 &&
            is(k, k.size(1), k.size(2), q.size(3)) && is(v, k.size(1), k.size(2), v.size(3)) &&
            is(grad, q.size(1), q.size(2), v.size(3)) && is(out, q.size(1), q.size(2), v.size(3)),
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
  const auto acc =
      q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor checks = empty(q, {q.size(0), q.size(1), q.size(2), 4}, acc);
  MIK_DISPATCH_FLOATING(q, [&] {
    Gradients<scalar_t>(grad, q, k, v, out, keep, bias,
                        {scale, softcap, temperature, causal, window}, dq, dk, dv, checks)
        .run();
  });
  return {dq, dk, dv, checks};
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) {
  m.impl("attention_gradients", TORCH_BOX(&attention_gradients));
}

}  // namespace
}  // namespace mik
