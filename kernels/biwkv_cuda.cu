// BiWKV on CUDA: starts the kernels of biwkv_kernels.cuh.
#include "biwkv_cuda.h"
#include "biwkv_launch.cuh"

namespace lalic::gpu {
namespace {

// Starts kernels on a stream until one fails to start.
class Launch {
 public:
  explicit Launch(cudaStream_t stream) : stream_(stream) {
    cudaGetLastError();  // an older error of somebody else's is not ours to report
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared, Arguments... arguments) const {
    if (status_ != cudaSuccess) return;
    kernel<<<blocks, threads, shared, stream_>>>(arguments...);
    status_ = cudaGetLastError();
  }

  cudaError_t status() const { return status_; }

 private:
  cudaStream_t stream_;
  mutable cudaError_t status_ = cudaSuccess;
};

template <class T>
View<const T> input(const Array& x) {
  return {static_cast<const T*>(x.data), x.stride_b, x.stride_t, x.stride_c};
}

template <class T>
View<T> result(const Array& x) {
  return {static_cast<T*>(const_cast<void*>(x.data)), x.stride_b, x.stride_t, x.stride_c};
}

template <class T>
Problem<T> problem_of(const Call& call) {
  using S = Scalar<T>;
  return {call.samples,
          call.tokens,
          call.channels,
          static_cast<const S*>(call.w),
          static_cast<const S*>(call.u),
          input<T>(call.k),
          input<T>(call.v)};
}

// function(problem) for the call's type of elements.
template <class Function>
auto with_type(const Call& call, const Function& function) {
  switch (call.type) {
    case Type::kDouble: return function(problem_of<double>(call));
    case Type::kHalf: return function(problem_of<__half>(call));
    case Type::kBFloat16: return function(problem_of<__nv_bfloat16>(call));
    default: return function(problem_of<float>(call));
  }
}

}  // namespace

int64_t tile_tokens() { return TileOf<float>::kTile; }
int64_t states_size(const Call& call) { return states_size(call.samples, call.tokens, call.channels); }
int64_t workspace_size(const Call& call) { return workspace_size(call.samples, call.tokens, call.channels); }
bool fits_grid(const Call& call) { return fits_grid(call.samples, call.tokens, call.channels); }
int64_t stride_limit() { return kStrideLimit; }

cudaError_t forward(const Call& call) {
  return with_type(call, [&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    const Launch launch(call.stream);
    forward(launch, problem, result<T>(call.y), static_cast<Scalar<T>*>(call.states));
    return launch.status();
  });
}

cudaError_t backward(const Call& call) {
  return with_type(call, [&](const auto& problem) {
    using T = typename std::decay_t<decltype(problem)>::Element;
    using S = Scalar<T>;
    const Launch launch(call.stream);
    backward(launch, problem, input<T>(call.gy), result<T>(call.gk), result<T>(call.gv), static_cast<S*>(call.gw),
             static_cast<S*>(call.gu), static_cast<S*>(call.states), static_cast<S*>(call.workspace));
    return launch.status();
  });
}

cudaError_t can_run() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, outputs<TileOf<float>>);
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace lalic::gpu
