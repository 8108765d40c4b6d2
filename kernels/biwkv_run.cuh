// BiWKV on a GPU, for one thread: a run of kTokens neighbouring tokens of one channel, in registers. The steps are those
// of biwkv_strip.h, with one reference exponent per run, and with an exact form beside each for inputs whose
// exponents spread too far for that. Compiled for the host too, by the tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "biwkv_scan.h"
#include "biwkv_view.h"

namespace lalic::gpu {

// What a tensor's elements are computed in.
template <class T>
struct Element {
  using Scalar = T;
  static __device__ __forceinline__ T load(T x) { return x; }
  static __device__ __forceinline__ T store(T x) { return x; }
};

template <>
struct Element<__half> {
  using Scalar = float;
  static __device__ __forceinline__ float load(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half store(float x) { return __float2half_rn(x); }
};

template <>
struct Element<__nv_bfloat16> {
  using Scalar = float;
  static __device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};

template <class T>
using Scalar = typename Element<T>::Scalar;

template <class T>
struct Problem {
  int64_t samples, tokens, channels;
  const Scalar<T>*w, *u;
  View<const T> k, v;
};

// How far exponents may spread under one reference, and weights may grow inside a run: e^-spread e^-growth and the
// inverse are still normal numbers.
template <class S>
struct Range {
  static constexpr S spread = sizeof(S) == 4 ? 45 : 300;
  static constexpr S growth = sizeof(S) == 4 ? 15 : 100;
};

template <class T, int kTokens>
struct Run {
  using S = Scalar<T>;

  View<const T> k, v;  // from the run's first token on
  int length;          // tokens that there are, 0 to kTokens; what is missing has no weight
  S w, u, q, bonus;
  S E[kTokens], x[kTokens];  // weights e^(k - m), where m is first `top` and then what `refer_to` was given; values
  S top, low;                // extreme k
  bool wide;                 // w or u alone is too large for one reference exponent

  __device__ __forceinline__ Run(const Problem<T>& problem, int64_t b, int64_t first, int64_t channel) {
    const bool inside = channel < problem.channels;
    const int64_t c = inside ? channel : 0, left = problem.tokens - first;
    length = !inside || left < 0 ? 0 : left < kTokens ? int(left) : kTokens;
    k = problem.k.from(b, length > 0 ? first : 0, c);
    v = problem.v.from(b, length > 0 ? first : 0, c);
    w = problem.w[c];
    u = problem.u[c];
    q = Math<S>::exp(-w);
    bonus = Math<S>::exp(u);
    wide = !(w * S(kTokens) >= -Range<S>::growth && u >= -Range<S>::growth && u <= 2 * Range<S>::growth);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      E[j] = j < length ? Element<T>::load(k.at(j, 0)) : S(kNothing);
      x[j] = j < length ? Element<T>::load(v.at(j, 0)) : S(0);
    }
    top = S(kNothing);
    low = -S(kNothing);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      top = Math<S>::max(E[j], top);
      if (j < length) low = E[j] < low ? E[j] : low;
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) E[j] = Math<S>::exp(E[j] - top);
  }

  // Whether all weights and sums may be in units of e^m, m >= top. NaN, as of inf - inf, is not.
  __device__ __forceinline__ bool fits_under(S m) const { return !wide && m - low <= Range<S>::spread; }

  __device__ __forceinline__ void refer_to(S m) {
    const S scale = Math<S>::exp(top - m);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) E[j] = E[j] * scale;
  }

  // The run's sums, as seen from the token after it and from the token before it.
  __device__ __forceinline__ void sums(State<S>& left, State<S>& right) const {
    if (!fits_under(top)) return sums_wide(left, right);
    Sums<S> l{}, r{};
#pragma unroll
    for (int j = 0; j < kTokens; ++j) push(l, q, E[j] * x[j], E[j]);
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) push(r, q, E[j] * x[j], E[j]);
    left = {l.num, l.den, top};
    right = {r.num, r.den, top};
  }

  // Every token's sum over what is right of it, from the sums that arrive from the right.
  __device__ __forceinline__ void right_sums(Sums<S> right, Sums<S>* rights) const {
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      rights[j] = right;
      push(right, q, E[j] * x[j], E[j]);
    }
  }

  __device__ __forceinline__ Output<S> output_of(int j, const Sums<S>& left, const Sums<S>& right) const {
    return output(left, right, bonus * E[j], x[j]);
  }

  // The exact forms: every token with its own exponent, read again from memory.

  __device__ __forceinline__ void push_token(State<S>& state, int j) const {
    push(state, w, Element<T>::load(v.at(j, 0)), S(1), Element<T>::load(k.at(j, 0)));
  }

  __device__ __forceinline__ void sums_wide(State<S>& left, State<S>& right) const {
    left = right = empty_state<S>();
#pragma unroll 1
    for (int j = 0; j < length; ++j) {
      push_token(left, j);
      push_token(right, length - 1 - j);
    }
  }

  // The sums over the two sides of token j, from those that arrive at the run.
  __device__ __forceinline__ void sides_wide(int j, State<S>& left, State<S>& right) const {
#pragma unroll 1
    for (int i = 0; i < j; ++i) push_token(left, i);
#pragma unroll 1
    for (int i = length - 1; i > j; --i) push_token(right, i);
  }

  // y, as num / den, with den in units of e^m.
  __device__ __forceinline__ State<S> total_wide(int j, const State<S>& left, const State<S>& right) const {
    const State<S> own{Element<T>::load(v.at(j, 0)), S(1), Element<T>::load(k.at(j, 0)) + u};
    return join(join(left, right), own);
  }
};

// g = (gN, gD) = (gy / D, -gN y) of an output.
template <class S>
__device__ __forceinline__ Sums<S> gradient_pair(S gy, const Output<S>& out) {
  const S gN = Math<S>::divide(gy, out.D);
  return {gN, -gN * out.y};
}

// A run in the backward pass: `gy` from its first token on, and the sums that arrive at the run from both sides.
template <class T, int kTokens>
struct GradientRun {
  using S = Scalar<T>;
  const Run<T, kTokens>& run;
  View<const T> gy;
  State<S> left, right;

  __device__ __forceinline__ S upstream(int j) const {
    return j < run.length ? Element<T>::load(gy.at(j, 0)) : S(0);
  }

  // The run's sums of g, as seen from the token after it and before it; in units of e^-m.
  __device__ __forceinline__ void sums(S m, const Sums<S>* rights, State<S>& g_left, State<S>& g_right) const {
    Sums<S> before = in_units_of(left, m), l{}, r{};
    S power = 1;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      Sums<S> g = gradient_pair(upstream(j), run.output_of(j, before, rights[j]));
      if (j >= run.length) g = {};
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
      push(l, run.q, g.num, g.den);
      r.num += power * g.num;
      r.den += power * g.den;
      power *= run.q;
    }
    g_left = {l.num, l.den, -m};
    g_right = {r.num, r.den, -m};
  }

  // gk, gv, and the run's part of gw and gu, from the sums of g that arrive at it.
  __device__ __forceinline__ void differentiate(S m, const Sums<S>* rights, const State<S>& arriving_left,
                                                const State<S>& arriving_right, const View<T>& gk, const View<T>& gv,
                                                S& gw, S& gu) const {
    // What is right of each token takes g's place there, from the right.
    Sums<S> g_rights[kTokens], before = in_units_of(left, m);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      g_rights[j] = gradient_pair(upstream(j), run.output_of(j, before, rights[j]));
      if (j >= run.length) g_rights[j] = {};
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
    }
    Sums<S> g_right = in_units_of(arriving_right, -m);
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      const Sums<S> g = g_rights[j];
      g_rights[j] = g_right;
      push(g_right, run.q, g.num, g.den);
    }
    // To the right again: the same outputs are cheaper to compute than to keep.
    Sums<S> g_left = in_units_of(arriving_left, -m);
    before = in_units_of(left, m);
    S across = 0;
    gu = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (j >= run.length) break;
      const Sums<S> g = gradient_pair(upstream(j), run.output_of(j, before, rights[j]));
      across += pairs(before, g_rights[j]) + pairs(rights[j], g_left);
      const auto out = token_gradient(run.E[j], run.bonus, run.x[j], g, g_left, g_rights[j]);
      gk.at(j, 0) = Element<T>::store(out.gk);
      gv.at(j, 0) = Element<T>::store(out.gv);
      gu += out.gu;
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
      push(g_left, run.q, g.num, g.den);
    }
    gw = -run.q * across;
  }

  // The exact forms. g of token j, with the sums over its sides, g's exponent being minus the total's.
  __device__ __forceinline__ State<S> gradient_wide(int j, State<S>& l, State<S>& r) const {
    l = left;
    r = right;
    run.sides_wide(j, l, r);
    const State<S> total = run.total_wide(j, l, r);
    const Sums<S> g = gradient_pair(upstream(j), Output<S>{Math<S>::divide(total.num, total.den), total.den});
    return {g.num, g.den, -total.m};
  }

  __device__ __forceinline__ void push_gradient(State<S>& state, int j) const {
    State<S> l, r;
    const State<S> g = gradient_wide(j, l, r);
    push(state, run.w, g.num, g.den, g.m);
  }

  __device__ __forceinline__ void sums_wide(State<S>& g_left, State<S>& g_right) const {
    g_left = g_right = empty_state<S>();
#pragma unroll 1
    for (int j = 0; j < run.length; ++j) {
      push_gradient(g_left, j);
      push_gradient(g_right, run.length - 1 - j);
    }
  }

  __device__ __forceinline__ void differentiate_wide(State<S> g_left, const State<S>& arriving_right,
                                                     const View<T>& gk, const View<T>& gv, S& gw, S& gu) const {
    gw = gu = 0;
#pragma unroll 1
    for (int j = 0; j < run.length; ++j) {
      State<S> g_right = arriving_right, l, r;
#pragma unroll 1
      for (int i = run.length - 1; i > j; --i) push_gradient(g_right, i);
      const State<S> g = gradient_wide(j, l, r);
      const S key = Element<T>::load(run.k.at(j, 0)), value = Element<T>::load(run.v.at(j, 0));
      const S own = Math<S>::exp(key + run.u + g.m);
      const Sums<S> from_left = in_units_of(g_left, -key), from_right = in_units_of(g_right, -key);
      const S GN = from_left.num + from_right.num, GD = from_left.den + from_right.den;
      const S bonus_part = own * (g.num * value + g.den);
      gk.at(j, 0) = Element<T>::store(value * GN + GD + bonus_part);
      gv.at(j, 0) = Element<T>::store(GN + own * g.num);
      gu += bonus_part;
      gw -= across_wide(l, g_right) + across_wide(r, g_left);
      push(g_left, run.w, g.num, g.den, g.m);
    }
  }

  __device__ __forceinline__ S across_wide(const State<S>& sums, const State<S>& g) const {
    return Math<S>::exp(sums.m + g.m - run.w) * pairs(Sums<S>{sums.num, sums.den}, Sums<S>{g.num, g.den});
  }
};

}  // namespace lalic::gpu
