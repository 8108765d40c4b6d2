// BiWKV on the CPU for one strip: all tokens of one sample and one block of channels, one SIMD lane each.
//
//   summarise          per chunk of tokens: its sums as seen from its two ends
//   connect            along the chunks: the sums that arrive at each chunk from the left and from the right
//   outputs            per chunk: y                                       (forward)
//   gradient_sums      per chunk: the sums of gN, gD as seen from its two ends (backward)
//   connect_gradients  as `connect`, for these sums
//   gradients          per chunk: gk, gv, and its part of gw, gu
//
// Every step treats its chunks independently (`connect` its strips), so any of them may run in parallel, and the
// bits do not depend on how they are shared out.
#pragma once

#include <algorithm>

#include "biwkv_layout.h"

namespace lalic {

template <class T>
struct Chunk {
  using Vector = typename Lanes<T>::Vector;
  State<Vector> left, right;      // after `summarise` its own sums, after `connect` those arriving
  State<Vector> g_left, g_right;  // the same for the gradients
  Vector top, low;                // extreme k of its tokens
  Vector gw, gu;
  bool wide;  // its exponents spread too far for one reference
};

template <class T>
class Strip : StripLayout<T> {
  using Base = StripLayout<T>;
  using typename Base::Vector;
  using Wide = typename Lanes<T>::Wide;
  using Base::b_, Base::C_, Base::channel_, Base::count_, Base::kLanes, Base::lanes_, Base::tokens_;
  using Base::destination, Base::finish, Base::length_of, Base::prefetch, Base::rows;
  // How far exponents may spread under one reference, and weights may grow inside a chunk: e^-kSpread e^-kGrowth
  // and the inverse are still normal numbers.
  static constexpr T kSpread = sizeof(T) == 4 ? 45 : 300;
  static constexpr T kGrowth = sizeof(T) == 4 ? 15 : 100;

 public:
  // `chunks` has room for all chunks of the strip. See StripLayout for the rest.
  Strip(const Problem<T>& problem, int64_t b, int64_t first, int64_t group, int64_t channel, Chunk<T>* chunks)
      : Base(problem.samples, problem.tokens, problem.channels, b, first, group, channel), chunks_(chunks),
        k_(problem.k.from(b, 0, channel)), v_(problem.v.from(b, 0, channel)) {
    for (int j = 0; j < kLanes; ++j) {
      w_[j] = j < lanes_ ? problem.w[channel + j] : 0;
      u_[j] = j < lanes_ ? problem.u[channel + j] : 0;
      q_[j] = std::exp(-w_[j]);
      bonus_[j] = std::exp(u_[j]);
      wide_ = wide_ || w_[j] * std::min<int64_t>(kChunk, tokens_) < -kGrowth || u_[j] < -kGrowth || u_[j] > 2 * kGrowth;
    }
  }

  int64_t count() const { return count_; }

  // The steps for chunk c prefetch chunk `next` of their tensors; any number is right.
  void summarise(int64_t c, int64_t next) {
    Chunk<T>& chunk = chunks_[c];
    Vector room_k[kChunk], room_v[kChunk];
    const int length = length_of(c);
    const auto k = rows(k_, c, room_k);
    Vector top = k.load(0), low = top;
    for (int t = 1; t < length; ++t) {
      const Vector x = k.load(t);
      top = x > top ? x : top;
      low = x < low ? x : low;
    }
    chunk.top = top;
    chunk.low = low;
    chunk.left = chunk.right = empty_state<Vector>();
    if (count_ == 1) return;  // nobody asks for its sums
    if (wide_ || !all_within(top - low, kSpread)) return summarise_wide(c);

    const auto v = rows(v_, c, room_v);
    const Vector q = q_;
    Sums<Vector> left{}, right{};
    Vector power = Vector{} + 1;
    Prefetch next_k = prefetch(k_, next), next_v = prefetch(v_, next);
    for (int t = 0; t < length; ++t) {
      next_k.step();
      next_v.step();
      const Vector E = Math<Vector>::exp(k.load(t) - top), Ev = E * v.load(t);
      push(left, q, Ev, E);
      right.num += power * Ev;
      right.den += power * E;
      power *= q;
    }
    chunk.left = {left.num, left.den, top};
    chunk.right = {right.num, right.den, top};
  }

  void connect() {
    connect_along(&Chunk<T>::left, 0, count_, 1);
    connect_along(&Chunk<T>::right, count_ - 1, -1, -1);
    for (int64_t c = 0; c < count_; ++c) {
      Chunk<T>& chunk = chunks_[c];
      chunk.wide = wide_ || !all_within(reference(chunk) - chunk.low, kSpread);
    }
  }

  void connect_gradients() {
    connect_along(&Chunk<T>::g_left, 0, count_, 1);
    connect_along(&Chunk<T>::g_right, count_ - 1, -1, -1);
  }

  void outputs(int64_t c, int64_t next, const View<T>& y_all) const {
    const Chunk<T>& chunk = chunks_[c];
    const View<T> y_view = y_all.from(b_, 0, channel_);
    if (chunk.wide) return outputs_wide(c, y_view);
    Vector room_k[kChunk], room_v[kChunk], room_y[kChunk], E[kChunk];
    Sums<Vector> rights[kChunk];
    const auto k = rows(k_, c, room_k), v = rows(v_, c, room_v);
    const auto y = destination(y_view, c, room_y);
    const int length = length_of(c);
    const Vector m = reference(chunk), q = q_, bonus = bonus_;
    right_sums(k, v, next, m, in_units_of(chunk.right, m), length, E, rights);
    Sums<Vector> left = in_units_of(chunk.left, m);
    Prefetch next_y = prefetch(y_view, next, y);
    for (int t = 0; t < length; ++t) {
      next_y.template step<1>();
      const Vector x = v.load(t);
      y.store(t, output(left, rights[t], bonus * E[t], x).y);
      push(left, q, E[t] * x, E[t]);
    }
    finish(y, y_view, c);
  }

  void gradient_sums(int64_t c, int64_t next, const View<const T>& gy_all) {
    Chunk<T>& chunk = chunks_[c];
    chunk.g_left = chunk.g_right = empty_state<Vector>();
    if (count_ == 1) return;
    const View<const T> gy_view = gy_all.from(b_, 0, channel_);
    if (chunk.wide) return gradient_sums_wide(c, gy_view);
    Vector room_k[kChunk], room_v[kChunk], room_gy[kChunk], E[kChunk];
    Sums<Vector> rights[kChunk];
    const auto k = rows(k_, c, room_k), v = rows(v_, c, room_v), gy = rows(gy_view, c, room_gy);
    const int length = length_of(c);
    const Vector m = reference(chunk), q = q_, bonus = bonus_;
    right_sums(k, v, next, m, in_units_of(chunk.right, m), length, E, rights);
    Sums<Vector> left = in_units_of(chunk.left, m), g_left{}, g_right{};
    Vector power = Vector{} + 1;
    Prefetch next_gy = prefetch(gy_view, next);
    for (int t = 0; t < length; ++t) {
      next_gy.step();
      const Vector x = v.load(t);
      const Sums<Vector> g = gradient_pair(gy.load(t), output(left, rights[t], bonus * E[t], x));
      push(left, q, E[t] * x, E[t]);
      push(g_left, q, g.num, g.den);
      g_right.num += power * g.num;
      g_right.den += power * g.den;
      power *= q;
    }
    chunk.g_left = {g_left.num, g_left.den, -m};
    chunk.g_right = {g_right.num, g_right.den, -m};
  }

  void gradients(int64_t c, int64_t next, const View<const T>& gy_all, const View<T>& gk_all,
                 const View<T>& gv_all) {
    Chunk<T>& chunk = chunks_[c];
    const View<const T> gy_view = gy_all.from(b_, 0, channel_);
    const View<T> gk_view = gk_all.from(b_, 0, channel_), gv_view = gv_all.from(b_, 0, channel_);
    const Vector m = reference(chunk);
    if (chunk.wide || !all_within(Math<Vector>::max(chunk.g_left.m, chunk.g_right.m) + m, 2 * kSpread - 10)) {
      return gradients_wide(c, gy_view, gk_view, gv_view);
    }
    Vector room_k[kChunk], room_v[kChunk], room_gy[kChunk], room_gk[kChunk], room_gv[kChunk], E[kChunk];
    Sums<Vector> rights[kChunk], lefts[kChunk], g[kChunk];
    Sums<Vector>* const g_lefts = rights;  // takes the place of each sum once that has been used
    const auto k = rows(k_, c, room_k), v = rows(v_, c, room_v), gy = rows(gy_view, c, room_gy);
    const auto gk = destination(gk_view, c, room_gk), gv = destination(gv_view, c, room_gv);
    const int length = length_of(c);
    const Vector q = q_, bonus = bonus_;
    right_sums(k, v, next, m, in_units_of(chunk.right, m), length, E, rights);

    // To the right: the sums over the left, each token's g, and what g on the left gives.
    Sums<Vector> left = in_units_of(chunk.left, m), g_left = in_units_of(chunk.g_left, -m);
    Vector across{}, gu{};
    Prefetch next_gy = prefetch(gy_view, next), next_gk = prefetch(gk_view, next, gk);
    for (int t = 0; t < length; ++t) {
      next_gy.step();
      next_gk.template step<1>();
      const Vector x = v.load(t);
      const Sums<Vector> here = gradient_pair(gy.load(t), output(left, rights[t], bonus * E[t], x));
      across += pairs(rights[t], g_left);
      g[t] = here;
      lefts[t] = left;
      g_lefts[t] = g_left;
      push(left, q, E[t] * x, E[t]);
      push(g_left, q, here.num, here.den);
    }
    // Back to the left: what g on the right gives.
    Sums<Vector> g_right = in_units_of(chunk.g_right, -m);
    Prefetch next_gv = prefetch(gv_view, next, gv);
    for (int t = length - 1; t >= 0; --t) {
      next_gv.template step<1>();
      across += pairs(lefts[t], g_right);
      const auto out = token_gradient(E[t], bonus, v.load(t), g[t], g_lefts[t], g_right);
      gk.store(t, out.gk);
      gv.store(t, out.gv);
      gu += out.gu;
      push(g_right, q, g[t].num, g[t].den);
    }
    finish(gk, gk_view, c);
    finish(gv, gv_view, c);
    chunk.gw = -q * across;
    chunk.gu = gu;
  }

  // The sums of gw and gu over the strip, in double and in the order of the chunks, to rows b of (B, C).
  void reduce(double* gw, double* gu) const {
    Wide sum_w{}, sum_u{};
    for (int64_t c = 0; c < count_; ++c) {
      sum_w += __builtin_convertvector(chunks_[c].gw, Wide);
      sum_u += __builtin_convertvector(chunks_[c].gu, Wide);
    }
    for (int j = 0; j < lanes_; ++j) {
      gw[b_ * C_ + channel_ + j] = sum_w[j];
      gu[b_ * C_ + channel_ + j] = sum_u[j];
    }
  }

 private:
  // Whether all lanes of x are at most `limit`; NaN, as of -inf - -inf, is not.
  static bool all_within(const Vector& x, T limit) {
    const auto inside = x <= limit;
    bool all = true;
    for (int j = 0; j < kLanes; ++j) all &= inside[j] != 0;
    return all;
  }

  // The exponent that the fast path's sums of a chunk refer to: the largest weight that reaches it.
  static Vector reference(const Chunk<T>& chunk) {
    return Math<Vector>::max(chunk.top, Math<Vector>::max(chunk.left.m, chunk.right.m));
  }

  static LALIC_HD Sums<Vector> gradient_pair(const Vector& gy, const Output<Vector>& out) {
    const Vector gN = gy / out.D;
    return {gN, -gN * out.y};
  }

  // The tokens' weights E, and the sums over what is right of each of them.
  LALIC_HD void right_sums(const Rows<const T>& k, const Rows<const T>& v, int64_t next, const Vector& m,
                           Sums<Vector> right, int length, Vector* E, Sums<Vector>* rights) const {
    const Vector q = q_;
    Prefetch next_k = prefetch(k_, next), next_v = prefetch(v_, next);
    for (int t = length - 1; t >= 0; --t) {
      next_k.step();
      next_v.step();
      const Vector weight = Math<Vector>::exp(k.load(t) - m);
      E[t] = weight;
      rights[t] = right;
      push(right, q, weight * v.load(t), weight);
    }
  }

  // Replaces the chunks' own sums with those arriving at them. The exponents are double: they decay once per
  // chunk, and in float32 that drifts by 1e-4 over long sequences.
  void connect_along(State<Vector> Chunk<T>::* side, int64_t first, int64_t end, int64_t step) {
    Vector num{}, den{};
    Wide m = Wide{} + double(kNothing);
    const Wide whole = __builtin_convertvector(w_, Wide) * double(kChunk);
    for (int64_t c = first; c != end; c += step) {
      State<Vector>& own = chunks_[c].*side;
      const State<Vector> arriving{num, den, __builtin_convertvector(m, Vector)};
      if (c + step != end) {
        const Wide own_m = __builtin_convertvector(own.m, Wide), old_m = m - whole;
        m = own_m > old_m ? own_m : old_m;
        const Vector scale = Math<Vector>::exp(__builtin_convertvector(old_m - m, Vector));
        const Vector scale_own = Math<Vector>::exp(__builtin_convertvector(own_m - m, Vector));
        num = num * scale + own.num * scale_own;
        den = den * scale + own.den * scale_own;
      }
      own = arriving;
    }
  }

  // The exact path: one lane after the other, in double, each token with its own exponent.
  WideChunk column(int64_t c, int lane) const {
    WideChunk column(w_[lane], u_[lane], length_of(c));
    for (int t = 0; t < column.length; ++t) {
      column.k[t] = k_.at(c * kChunk + t, lane);
      column.v[t] = v_.at(c * kChunk + t, lane);
    }
    return column;
  }

  WideChunk gradient_column(int64_t c, int lane, const View<const T>& gy) const {
    WideChunk tokens = column(c, lane);
    tokens.connect(lane_of(chunks_[c].left, lane), lane_of(chunks_[c].right, lane));
    for (int t = 0; t < tokens.length; ++t) tokens.set_gradient(t, gy.at(c * kChunk + t, lane));
    return tokens;
  }

  static State<double> lane_of(const State<Vector>& state, int j) { return {state.num[j], state.den[j], state.m[j]}; }

  static void set_lane(State<Vector>& state, int j, const State<double>& value) {
    state.num[j] = T(value.num);
    state.den[j] = T(value.den);
    state.m[j] = T(value.m);
  }

  __attribute__((noinline)) void summarise_wide(int64_t c) {
    for (int j = 0; j < lanes_; ++j) {
      const WideChunk tokens = column(c, j);
      set_lane(chunks_[c].left, j, tokens.left_sum());
      set_lane(chunks_[c].right, j, tokens.right_sum());
    }
  }

  __attribute__((noinline)) void outputs_wide(int64_t c, const View<T>& y) const {
    for (int j = 0; j < lanes_; ++j) {
      WideChunk tokens = column(c, j);
      tokens.connect(lane_of(chunks_[c].left, j), lane_of(chunks_[c].right, j));
      for (int t = 0; t < tokens.length; ++t) y.at(c * kChunk + t, j) = T(tokens.y[t]);
    }
  }

  __attribute__((noinline)) void gradient_sums_wide(int64_t c, const View<const T>& gy) {
    Chunk<T>& chunk = chunks_[c];
    for (int j = 0; j < lanes_; ++j) {
      const WideChunk tokens = gradient_column(c, j, gy);
      set_lane(chunk.g_left, j, tokens.left_gradient_sum());
      set_lane(chunk.g_right, j, tokens.right_gradient_sum());
    }
  }

  __attribute__((noinline)) void gradients_wide(int64_t c, const View<const T>& gy, const View<T>& gk,
                                                 const View<T>& gv) {
    Chunk<T>& chunk = chunks_[c];
    chunk.gw = chunk.gu = Vector{};
    for (int j = 0; j < lanes_; ++j) {
      WideChunk tokens = gradient_column(c, j, gy);
      tokens.differentiate(lane_of(chunk.g_left, j), lane_of(chunk.g_right, j));
      for (int t = 0; t < tokens.length; ++t) {
        gk.at(c * kChunk + t, j) = T(tokens.gk[t]);
        gv.at(c * kChunk + t, j) = T(tokens.gv[t]);
      }
      chunk.gw[j] = T(tokens.gw);
      chunk.gu[j] = T(tokens.gu);
    }
  }

  Chunk<T>* chunks_;
  View<const T> k_, v_;
  Vector w_{}, u_{}, q_{}, bonus_{};
  bool wide_ = false;  // w or u alone is too large for the fast path
};

}  // namespace lalic
