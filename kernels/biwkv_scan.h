// The algebra of BiWKV: decayed sums over the tokens left and right of a token, and how they give the output
// and the gradients. Shared by every machine: S is a scalar (CUDA threads, the CPU's exact path) or a SIMD
// vector of scalars, one lane per channel (the CPU's fast path). The formulas are derived in reference.py.
//
// Two forms of the same sums:
//   Sums   (num, den) in units of e^m for an exponent m that the caller keeps, one per chunk: no exp per push.
//   State  (num, den) with its own exponent m: holds for any finite inputs, one exp per push.
// Nothing is ever subtracted: sums over the tokens on the right are pushed from the right.
#pragma once

#if defined(__CUDACC__)
#define LALIC_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LALIC_HD inline __attribute__((always_inline))
#else
#define LALIC_HD inline
#endif

#include <cmath>

namespace lalic {

// What the algebra needs of S beyond + - *. Vector types add their own specialisation.
template <class S>
struct Math {
  static LALIC_HD S exp(S x) { return ::exp(x); }
  static LALIC_HD S max(S a, S b) { return a > b ? a : b; }
  static LALIC_HD S divide(S a, S b) { return a / b; }
};

// On a GPU by the special function unit. Its e^x is off by 2 ulp and |x| 2^-24: weights near 1 are exact, and those
// that are far below carry no weight. Its quotients are off by 2 ulp for denominators below 2^126.
template <>
struct Math<float> {
#if defined(__CUDA_ARCH__) || defined(LALIC_EMULATED_CUDA)
  static LALIC_HD float exp(float x) { return __expf(x); }
  static LALIC_HD float divide(float a, float b) { return __fdividef(a, b); }
  static LALIC_HD float max(float a, float b) { return ::fmaxf(a, b); }
#else
  static LALIC_HD float exp(float x) { return ::expf(x); }
  static LALIC_HD float divide(float a, float b) { return a / b; }
  static LALIC_HD float max(float a, float b) { return a > b ? a : b; }
#endif
};

// The exponent of "no token yet": far below any other, and finite, because -inf - -inf would be NaN.
constexpr float kNothing = -1e30f;

template <class S>
struct Sums {
  S num, den;
};

// One token further: what was summed decays by q = e^-w, then the token joins.
template <class S>
LALIC_HD void push(Sums<S>& sums, S q, S num, S den) {
  sums.num = sums.num * q + num;
  sums.den = sums.den * q + den;
}

// M, the type of the exponent, may be wider than S: an exponent that decays many times drifts in float.
template <class S, class M = S>
struct State {
  S num, den;
  M m;
};

template <class S, class M = S>
LALIC_HD State<S, M> empty_state() {
  return {S{}, S{}, M{} + kNothing};
}

template <class S, class M>
LALIC_HD void decay(State<S, M>& state, M amount) {
  state.m = state.m - amount;
}

// The sum of two states.
template <class S, class M>
LALIC_HD State<S, M> join(const State<S, M>& a, const State<S, M>& b) {
  const M m = Math<M>::max(a.m, b.m);
  const S scale_a = Math<S>::exp(S(a.m - m)), scale_b = Math<S>::exp(S(b.m - m));
  return {a.num * scale_a + b.num * scale_b, a.den * scale_a + b.den * scale_b, m};
}

// One token further: the state decays by w, then (num, den) e^exponent joins.
template <class S>
LALIC_HD void push(State<S>& state, S w, S num, S den, S exponent) {
  decay(state, w);
  state = join(state, State<S>{num, den, exponent});
}

// The state in units of e^m.
template <class S>
LALIC_HD Sums<S> in_units_of(const State<S>& state, S m) {
  const S scale = Math<S>::exp(state.m - m);
  return {state.num * scale, state.den * scale};
}

template <class S>
struct Output {
  S y, D;
};

// Output of a token with weight E = e^(k-m), own weight e^u E, and sums of its two sides in the same units.
template <class S>
LALIC_HD Output<S> output(const Sums<S>& left, const Sums<S>& right, S own, S v) {
  const S D = left.den + right.den + own;
  return {Math<S>::divide(left.num + right.num + own * v, D), D};
}

// sum num num' + den den': over the pairs of tokens with this one between them, when g holds the sums of gN, gD
// on the other side. -e^-w times its total over the tokens, for both directions, is gw.
template <class S>
LALIC_HD S pairs(const Sums<S>& sums, const Sums<S>& g) {
  return sums.num * g.num + sums.den * g.den;
}

template <class S>
struct TokenGradient {
  S gk, gv;
  S gu;  // this token's part of gu
};

// Gradients of a token: g = (gN, gD) = (gy/D, -gN y), with g_left, g_right their sums over the two sides.
template <class S>
LALIC_HD TokenGradient<S> token_gradient(S E, S bonus, S v, const Sums<S>& g, const Sums<S>& g_left,
                                         const Sums<S>& g_right) {
  const S GN = g_left.num + g_right.num, GD = g_left.den + g_right.den;
  const S gu = bonus * E * (g.num * v + g.den);
  return {E * (v * GN + GD) + gu, E * (GN + bonus * g.num), gu};
}

}  // namespace lalic
