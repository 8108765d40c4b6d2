// 64-byte vectors of float and double for host compilers that know GCC's vector extension (GCC, Clang): the
// compiler maps them to what -march offers, from one AVX-512 register to several SSE or NEON ones.
#pragma once

#include <cstdint>

#include "biwkv_scan.h"

namespace lalic {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Long8 __attribute__((vector_size(64)));
typedef double Double16 __attribute__((vector_size(128)));
typedef int64_t Long16 __attribute__((vector_size(128)));

// Lanes<T>: the vector of T, how many lanes it has, and the vector of as many doubles.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Float16;
  using Wide = Double16;
  static constexpr int count = 16;
};

template <>
struct Lanes<double> {
  using Vector = Double8;
  using Wide = Double8;
  static constexpr int count = 8;
};

// e^x to about 1 ulp for x up to 88 (float) and 709 (double); below -87 and -708 the smallest normal number
// stands for 0. libm's exp does not vectorise without -ffast-math. x = n ln 2 + r, |r| <= ln 2 / 2; adding 1.5 *
// 2^mantissa rounds to the integer n and leaves n in the low bits. NaN stays NaN.
template <>
struct Math<Float16> {
  static LALIC_HD Float16 max(Float16 a, Float16 b) { return a > b ? a : b; }
  static LALIC_HD Float16 divide(Float16 a, Float16 b) { return a / b; }

  static LALIC_HD Float16 exp(Float16 x) {
    x = x < -87.3f ? Float16{} - 87.3f : x;
    const Float16 shifted = x * 0x1.715476p+0f + 0x1.8p23f;
    const Float16 n = shifted - 0x1.8p23f;
    Float16 r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    // 1 + r + r^2 p(r), p fitted to relative error 4e-9.
    Float16 p = r * 0x1.6a2356p-10f + 0x1.123a72p-7f;
    p = p * r + 0x1.5558f4p-5f;
    p = p * r + 0x1.55549p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * (r * r) + r;
    const Int16 bits = ((Int16)shifted << 23) + (127 << 23);
    return (Float16)bits * p + (Float16)bits;
  }
};

template <class Double, class Long>
struct DoubleMath {
  static LALIC_HD Double max(Double a, Double b) { return a > b ? a : b; }
  static LALIC_HD Double divide(Double a, Double b) { return a / b; }

  static LALIC_HD Double exp(Double x) {
    x = x < -708.0 ? Double{} - 708.0 : x;
    const Double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
    const Double n = shifted - 0x1.8p52;
    Double r = x - n * 0x1.62e42fefap-1;
    r = r - n * 0x1.cf79abc9e3b3ap-40;
    // Taylor to r^13: the first term left out is below 4e-18.
    Double p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r;
    const Long bits = ((Long)shifted << 52) + (int64_t(1023) << 52);
    return (Double)bits * p + (Double)bits;
  }
};

template <>
struct Math<Double8> : DoubleMath<Double8, Long8> {};
template <>
struct Math<Double16> : DoubleMath<Double16, Long16> {};

}  // namespace lalic
