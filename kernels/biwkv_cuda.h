// The interface between the CUDA kernels (biwkv_cuda.cu, compiled by nvcc, knows no PyTorch) and the operator
// (biwkv_cuda.cpp, compiled by the C++ compiler, knows no kernels).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lalic::gpu {

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

// A (B, T, C) tensor; strides count elements.
struct Array {
  const void* data;
  int64_t stride_b, stride_t, stride_c;
};

// w, u, gw, gu, the states and the workspace are float, or double for Type::kDouble.
struct Call {
  Type type;
  int64_t samples, tokens, channels;
  const void *w, *u;
  Array k, v;
  Array gy;         // backward only
  Array y, gk, gv;  // results: y of the forward, the others of the backward
  void *gw, *gu;
  void* states;     // written by the forward, read by the backward
  void* workspace;  // backward only
  cudaStream_t stream;
};

// What a shape needs: tokens of a tile; scalars of states and of workspace; whether the grid that CUDA allows holds it.
int64_t tile_tokens();
int64_t states_size(const Call& call);
int64_t workspace_size(const Call& call);
bool fits_grid(const Call& call);
// Strides per token and channel must be smaller.
int64_t stride_limit();

// Queue a call on its stream of the current device. Not cudaSuccess: a launch failed, nothing is to be believed.
cudaError_t forward(const Call& call);
cudaError_t backward(const Call& call);

// Whether this library holds code that runs on the current device.
cudaError_t can_run();

}  // namespace lalic::gpu
