// BiWKV on a GPU, for one thread: a run of kTokens neighbouring tokens of one channel, in registers. The steps are those
// of biwkv_strip.h, with one reference exponent per run, and with an exact form beside each for inputs whose
// exponents spread too far for that. Compiled for the host too, by the tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

// Where a thread is: the corner of its block's tile, and its own offsets from there.
struct Where {
  int64_t b, first_token, first_channel;
  unsigned token, channel;
};

// The elements of one channel at neighbouring tokens, from the thread's first one on. Steps and offsets have 32 bits, so
// that an address costs one or two instructions: a view's strides per token and channel are below `kStrideLimit`.
template <class T>
struct Column {
  char* data;
  unsigned step;  // bytes

  __device__ __forceinline__ Column(const View<T>& view, const Where& at)
      : step(unsigned(view.stride_t) * unsigned(sizeof(T))) {
    const View<T> corner = view.from(at.b, at.first_token, at.first_channel);
    data = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(corner.data)) +
           (uint64_t(step) * at.token + uint64_t(unsigned(view.stride_c)) * (at.channel * unsigned(sizeof(T))));
#if defined(__CUDA_ARCH__)
    // Or the compiler computes the whole address anew for every token.
    size_t address = __cvta_generic_to_global(data);
    asm("" : "+l"(address));
    data = static_cast<char*>(__cvta_global_to_generic(address));
#endif
  }
  __device__ __forceinline__ T& operator[](int j) const {
    return *reinterpret_cast<T*>(data + uint64_t(step) * unsigned(j));
  }
};

constexpr int64_t kStrideLimit = int64_t(1) << 28;

template <class T>
struct Problem {
  using Element = T;
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

  Column<const T> k, v;
  int length;  // tokens that there are, 0 to kTokens
  S w, u, q, bonus;
  S E[kTokens], x[kTokens];  // weights e^(k - m), where m is first `top` and then what `refer_to` was given; values
  S top = S(kNothing), low = S(kNothing);  // extreme k
  bool wide;                 // only the exact forms: w or u is too large for one reference exponent, or tokens are missing

  // A run beyond the last token or channel has length 0, and addresses that are not used.
  __device__ __forceinline__ Run(const Problem<T>& problem, const Where& at) : k(problem.k, at), v(problem.v, at) {
    const int64_t c = at.first_channel + at.channel, rest = problem.tokens - at.first_token - at.token;
    const bool inside = c < problem.channels;
    length = !inside || rest < 0 ? 0 : rest < kTokens ? int(rest) : kTokens;
    w = problem.w[inside ? c : 0];
    u = problem.u[inside ? c : 0];
    q = Math<S>::exp(-w);
    bonus = Math<S>::exp(u);
    const bool tame = w * S(kTokens) >= -Range<S>::growth && u >= -Range<S>::growth && u <= 2 * Range<S>::growth;
    wide = length < kTokens || !tame;
    if (length < kTokens) return;  // the last tokens alone: one run in a sequence
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      E[j] = Element<T>::load(k[j]);
      x[j] = Element<T>::load(v[j]);
    }
    top = Math<S>::max(E[0], S(kNothing));
    low = E[0];
#pragma unroll
    for (int j = 1; j < kTokens; ++j) {
      top = Math<S>::max(E[j], top);
      low = -Math<S>::max(-E[j], -low);
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
    push(state, w, Element<T>::load(v[j]), S(1), Element<T>::load(k[j]));
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
    const State<S> own{Element<T>::load(v[j]), S(1), Element<T>::load(k[j]) + u};
    return join(join(left, right), own);
  }
};

// g = (gN, gD) = (gy / D, -gN y) of an output.
template <class S>
__device__ __forceinline__ Sums<S> gradient_pair(S gy, const Output<S>& out) {
  const S gN = Math<S>::divide(gy, out.D);
  return {gN, -gN * out.y};
}

// A run in the backward pass: its gy, and the sums that arrive at it from both sides.
template <class T, int kTokens>
struct GradientRun {
  using S = Scalar<T>;
  const Run<T, kTokens>& run;
  Column<const T> gy;
  State<S> left, right;

  // Every token's g, and the run's sums of them, as seen from the token after it and before it; in units of e^-m.
  __device__ __forceinline__ void sums(S m, const Sums<S>* rights, Sums<S>* g, State<S>& g_left,
                                       State<S>& g_right) const {
    Sums<S> before = in_units_of(left, m), l{}, r{};
    S power = 1;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      g[j] = gradient_pair(Element<T>::load(gy[j]), run.output_of(j, before, rights[j]));
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
      push(l, run.q, g[j].num, g[j].den);
      r.num += power * g[j].num;
      r.den += power * g[j].den;
      power *= run.q;
    }
    g_left = {l.num, l.den, -m};
    g_right = {r.num, r.den, -m};
  }

  // gk, gv, and the run's part of gw and gu, from the sums of g that arrive at it.
  __device__ __forceinline__ void differentiate(S m, const Sums<S>* rights, const Sums<S>* g,
                                                const State<S>& arriving_left, const State<S>& arriving_right,
                                                const Column<T>& gk, const Column<T>& gv, S& gw, S& gu) const {
    Sums<S> g_rights[kTokens], g_right = in_units_of(arriving_right, -m);
#pragma unroll
    for (int j = kTokens - 1; j >= 0; --j) {
      g_rights[j] = g_right;
      push(g_right, run.q, g[j].num, g[j].den);
    }
    Sums<S> g_left = in_units_of(arriving_left, -m), before = in_units_of(left, m);
    S across = 0;
    gu = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      across += pairs(before, g_rights[j]) + pairs(rights[j], g_left);
      const auto out = token_gradient(run.E[j], run.bonus, run.x[j], g[j], g_left, g_rights[j]);
      gk[j] = Element<T>::store(out.gk);
      gv[j] = Element<T>::store(out.gv);
      gu += out.gu;
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
      push(g_left, run.q, g[j].num, g[j].den);
    }
    gw = -run.q * across;
  }

  // The exact forms. g of token j, with the sums over its sides, g's exponent being minus the total's.
  __device__ __forceinline__ State<S> gradient_wide(int j, State<S>& l, State<S>& r) const {
    l = left;
    r = right;
    run.sides_wide(j, l, r);
    const State<S> total = run.total_wide(j, l, r);
    const Sums<S> g = gradient_pair(Element<T>::load(gy[j]), Output<S>{Math<S>::divide(total.num, total.den), total.den});
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
                                                     const Column<T>& gk, const Column<T>& gv, S& gw, S& gu) const {
    gw = gu = 0;
#pragma unroll 1
    for (int j = 0; j < run.length; ++j) {
      State<S> g_right = arriving_right, l, r;
#pragma unroll 1
      for (int i = run.length - 1; i > j; --i) push_gradient(g_right, i);
      const State<S> g = gradient_wide(j, l, r);
      const S key = Element<T>::load(run.k[j]), value = Element<T>::load(run.v[j]);
      const S own = Math<S>::exp(key + run.u + g.m);
      const Sums<S> from_left = in_units_of(g_left, -key), from_right = in_units_of(g_right, -key);
      const S GN = from_left.num + from_right.num, GD = from_left.den + from_right.den;
      const S bonus_part = own * (g.num * value + g.den);
      gk[j] = Element<T>::store(value * GN + GD + bonus_part);
      gv[j] = Element<T>::store(GN + own * g.num);
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
