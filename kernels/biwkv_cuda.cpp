// BiWKV on CUDA: forward and backward as operators of the library `lalic_cuda`. The schema that users see,
// lalic::biwkv, its autograd and its checks in Python are in lalic/ops.py; the kernels are in biwkv_kernels.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "biwkv_check.h"
#include "biwkv_cuda.h"

namespace {

using at::Tensor;
namespace gpu = lalic::gpu;

at::ScalarType scalar_of(const Tensor& k) { return k.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& states) {
  TORCH_CHECK(k.is_cuda(), "biwkv: the CUDA kernel takes CUDA tensors, not ", k.device());
  lalic::check_inputs(w, u, k, v, scalar_of(k));
  TORCH_CHECK(states.device() == k.device() && states.is_contiguous() && states.scalar_type() == scalar_of(k),
              "biwkv: the states are not those of a forward");
}

gpu::Type type_of(const Tensor& k) {
  switch (k.scalar_type()) {
    case at::kFloat: return gpu::Type::kFloat;
    case at::kDouble: return gpu::Type::kDouble;
    case at::kHalf: return gpu::Type::kHalf;
    case at::kBFloat16: return gpu::Type::kBFloat16;
    default: TORCH_CHECK(false, "biwkv: the CUDA kernel takes float32, float64, bfloat16 and float16, not ", k.scalar_type());
  }
}

// The tensor as the kernels can address it: in place, unless a stride is far beyond what a picture has.
Tensor addressable(const Tensor& x) {
  return x.stride(1) < gpu::stride_limit() && x.stride(2) < gpu::stride_limit() ? x : x.contiguous();
}

gpu::Array array(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

gpu::Call call_of(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& states) {
  gpu::Call call{};
  call.type = type_of(k);
  call.samples = k.size(0);
  call.tokens = k.size(1);
  call.channels = k.size(2);
  call.w = w.const_data_ptr();
  call.u = u.const_data_ptr();
  call.k = array(k);
  call.v = array(v);
  call.states = const_cast<void*>(states.const_data_ptr());
  call.stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK(states.numel() == gpu::states_size(call), "biwkv: states have ", states.numel(), " numbers, but ",
              gpu::states_size(call), " are needed: they are not those of a forward of this shape");
  TORCH_CHECK(gpu::fits_grid(call), "biwkv: ", k.sizes(), " is more than one call can take: cut the batch in parts");
  return call;
}

Tensor biwkv(const Tensor& w_, const Tensor& u_, const Tensor& k_, const Tensor& v_, const Tensor& states) {
  check(w_, u_, k_, v_, states);
  const c10::cuda::CUDAGuard guard(k_.device());
  const Tensor w = w_.contiguous(), u = u_.contiguous(), k = addressable(k_), v = addressable(v_);
  const Tensor y = at::empty(v.sizes(), v.options());
  if (y.numel() == 0) return y;
  gpu::Call call = call_of(w, u, k, v, states);
  call.y = array(y);
  C10_CUDA_CHECK(gpu::forward(call));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> biwkv_backward(const Tensor& gy_, const Tensor& w_, const Tensor& u_,
                                                          const Tensor& k_, const Tensor& v_, const Tensor& states) {
  check(w_, u_, k_, v_, states);
  lalic::check_gradient(gy_, v_);
  const c10::cuda::CUDAGuard guard(k_.device());
  const Tensor w = w_.contiguous(), u = u_.contiguous();
  const Tensor gy = addressable(gy_), k = addressable(k_), v = addressable(v_);
  const Tensor gk = at::empty(k.sizes(), k.options()), gv = at::empty(v.sizes(), v.options());
  if (k.numel() == 0) return {at::zeros_like(w), at::zeros_like(u), gk, gv};
  const Tensor gw = at::empty(w.sizes(), w.options()), gu = at::empty(u.sizes(), u.options());
  gpu::Call call = call_of(w, u, k, v, states);
  const Tensor workspace = at::empty({gpu::workspace_size(call)}, w.options());
  call.gy = array(gy);
  call.gk = array(gk);
  call.gv = array(gv);
  call.gw = gw.mutable_data_ptr();
  call.gu = gu.mutable_data_ptr();
  call.workspace = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(gpu::backward(call));
  return {gw, gu, gk, gv};
}

int64_t tile_tokens() { return gpu::tile_tokens(); }

// Why this library cannot run on a device; empty when it can.
std::string problem_on_device(int64_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const cudaError_t status = gpu::can_run();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace

TORCH_LIBRARY(lalic_cuda, m) {
  m.def("biwkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) states) -> Tensor");
  m.def("biwkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor states) -> (Tensor, Tensor, Tensor, "
        "Tensor)");
  m.def("tile_tokens() -> int", &tile_tokens);
  m.def("problem_on_device(int device) -> str", &problem_on_device);
}

TORCH_LIBRARY_IMPL(lalic_cuda, CUDA, m) {
  m.impl("biwkv", &biwkv);
  m.impl("biwkv_backward", &biwkv_backward);
}
