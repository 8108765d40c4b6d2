// BiWKV for one channel of one chunk with an exponent per token, in double: for inputs whose exponents spread
// too far for one reference exponent (a token that dominates its chunk under a strong decay, a strong growth).
// Nearly a hundred times slower than the fast path; any finite input is in its domain.
#pragma once

#include <algorithm>
#include <cstdint>

#include "biwkv_scan.h"

namespace lalic {

// Tokens of a chunk: the working set, a few vectors per token, should stay in the first-level cache.
constexpr int kChunk = 64;

struct WideChunk {
  using S = State<double>;

  WideChunk(double w_, double u_, int length_) : length(length_), w(w_), u(u_) {}

  S left_sum() const { return left_of(v, nullptr, k); }
  S right_sum() const { return right_of(v, nullptr, k); }
  S left_gradient_sum() const { return left_of(gN, gD, minus_m); }
  S right_gradient_sum() const { return right_of(gN, gD, minus_m); }

  // From the sums arriving at the chunk: the sums of every token's two sides, y, D and D's exponent.
  void connect(S arriving_left, S arriving_right) {
    scan(arriving_left, arriving_right, v, nullptr, k, left, right);
    for (int t = 0; t < length; ++t) {
      const S total = join(join(left[t], right[t]), S{v[t], 1.0, k[t] + u});
      y[t] = total.num / total.den;
      D[t] = total.den;
      minus_m[t] = -total.m;
    }
  }

  void set_gradient(int t, double gy) {
    gN[t] = gy / D[t];
    gD[t] = -gN[t] * y[t];
  }

  // After `connect` and `set_gradient`: gk, gv, and the chunk's part of gw and gu.
  void differentiate(S arriving_left, S arriving_right) {
    scan(arriving_left, arriving_right, gN, gD, minus_m, g_left, g_right);
    for (int t = 0; t < length; ++t) {
      const double from_left = std::exp(k[t] + g_left[t].m), from_right = std::exp(k[t] + g_right[t].m);
      const double own = std::exp(k[t] + u + minus_m[t]);
      const double GN = from_left * g_left[t].num + from_right * g_right[t].num;
      const double GD = from_left * g_left[t].den + from_right * g_right[t].den;
      const double S_own = own * (gN[t] * v[t] + gD[t]);
      gk[t] = v[t] * GN + GD + S_own;
      gv[t] = GN + own * gN[t];
      gu += S_own;
      gw -= pairs(left[t], g_right[t]) + pairs(right[t], g_left[t]);
    }
  }

  const int length;
  double k[kChunk], v[kChunk], y[kChunk], gk[kChunk], gv[kChunk];
  double gw = 0, gu = 0;

 private:
  // Pairs of tokens with this one between them, one side's sums against the gradients of the other side.
  double pairs(const S& sums, const S& g) const {
    return std::exp(sums.m + g.m - w) * (sums.num * g.num + sums.den * g.den);
  }

  S left_of(const double* num, const double* den, const double* exponent) const {
    S state = empty_state<double>();
    for (int t = 0; t < length; ++t) push(state, w, num[t], den ? den[t] : 1.0, exponent[t]);
    return state;
  }

  S right_of(const double* num, const double* den, const double* exponent) const {
    S state = empty_state<double>();
    for (int t = length - 1; t >= 0; --t) push(state, w, num[t], den ? den[t] : 1.0, exponent[t]);
    return state;
  }

  void scan(S from_left, S from_right, const double* num, const double* den, const double* exponent, S* lefts,
            S* rights) const {
    for (int t = 0; t < length; ++t) {
      lefts[t] = from_left;
      push(from_left, w, num[t], den ? den[t] : 1.0, exponent[t]);
    }
    for (int t = length - 1; t >= 0; --t) {
      rights[t] = from_right;
      push(from_right, w, num[t], den ? den[t] : 1.0, exponent[t]);
    }
  }

  const double w, u;
  double D[kChunk], minus_m[kChunk], gN[kChunk], gD[kChunk];
  S left[kChunk], right[kChunk], g_left[kChunk], g_right[kChunk];
};

}  // namespace lalic
