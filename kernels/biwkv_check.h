// What the operators of every device ask of their arguments. lalic/ops.py has said it more gently before.
#pragma once

#include <ATen/core/Tensor.h>

namespace lalic {

// w, u: (C,) of `scalar`; k, v: (B, T, C) of one dtype; all on the device of k.
inline void check_inputs(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
                         at::ScalarType scalar) {
  TORCH_CHECK(k.dim() == 3 && v.sizes() == k.sizes(), "biwkv: k and v must both be (B, T, C), but are ", k.sizes(),
              " and ", v.sizes());
  TORCH_CHECK(k.size(1) > 0 && k.size(2) > 0, "biwkv: at least one token and one channel are needed");
  for (const at::Tensor* x : {&w, &u}) {
    TORCH_CHECK(x->dim() == 1 && x->size(0) == k.size(2), "biwkv: w and u must be (C,) = (", k.size(2), ",)");
    TORCH_CHECK(x->scalar_type() == scalar, "biwkv: w and u must be ", scalar, " for k of ", k.scalar_type());
  }
  TORCH_CHECK(v.scalar_type() == k.scalar_type(), "biwkv: k and v must have one dtype");
  for (const at::Tensor* x : {&w, &u, &v}) {
    TORCH_CHECK(x->device() == k.device(), "biwkv: all tensors must be on one device, not ", x->device(), " and ",
                k.device());
  }
}

inline void check_gradient(const at::Tensor& gy, const at::Tensor& v) {
  TORCH_CHECK(gy.sizes() == v.sizes() && gy.device() == v.device() && gy.scalar_type() == v.scalar_type(),
              "biwkv_backward: gy must be like v in shape, dtype and device");
}

}  // namespace lalic
