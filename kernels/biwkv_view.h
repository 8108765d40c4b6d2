// Where the numbers of a (B, T, C) tensor are, for host and device code.
#pragma once

#include <cstdint>

#include "biwkv_scan.h"

namespace lalic {

// A (B, T, C) tensor with any strides, counted in elements. T may be const.
template <class T>
struct View {
  T* data;
  int64_t stride_b, stride_t, stride_c;

  LALIC_HD View from(int64_t b, int64_t t, int64_t c) const {
    return {data + b * stride_b + t * stride_t + c * stride_c, stride_b, stride_t, stride_c};
  }
  LALIC_HD T& at(int64_t t, int64_t c) const { return data[t * stride_t + c * stride_c]; }
};

}  // namespace lalic
