// Runs the CUDA kernels of BiWKV under emulator.h on one call's inputs.
//
//   run DTYPE B T C ORDER STRIDES IN OUT     (DTYPE float double half bfloat16; ORDER 0 1 2; STRIDES b,t,c of k, v and
//                                             gy, or "-" for contiguous)
//
// IN holds w, u, then k, v, gy (each one block of memory that the strides address), as raw numbers; OUT gets y, gw, gu,
// gk, gv. w, u, gw, gu are float, or double for double. Every array is its own allocation, filled with NaN before it
// is written, so that the sanitizer and the test see what is out of bounds or missing.
#include "emulator.h"

// So few that short sequences have several slabs.
#define LALIC_TILES_PER_SLAB 3
#include "biwkv_launch.cuh"

#include <fstream>
#include <string>

using namespace lalic;
using namespace lalic::gpu;

template <class X>
std::unique_ptr<X[]> make(int64_t count) {
  std::unique_ptr<X[]> out(new X[count]);
  std::memset(static_cast<void*>(out.get()), 0xff, count * sizeof(X));
  return out;
}

template <class X>
std::unique_ptr<X[]> read(std::ifstream& file, int64_t count) {
  auto out = make<X>(count);
  if (!file.read(reinterpret_cast<char*>(out.get()), count * sizeof(X))) throw std::runtime_error("the input is short");
  return out;
}

template <class X>
void write(std::ofstream& file, const std::unique_ptr<X[]>& x, int64_t count) {
  file.write(reinterpret_cast<const char*>(x.get()), count * sizeof(X));
}

template <class T>
void run(char** arguments) {
  using S = Scalar<T>;
  const int64_t B = std::atoll(arguments[2]), tokens = std::atoll(arguments[3]), C = std::atoll(arguments[4]);
  const auto order = emulator::Order(std::atoi(arguments[5]));
  long long strides[3] = {tokens * C, C, 1};
  const std::string given = arguments[6];
  if (given != "-" && std::sscanf(given.c_str(), "%lld,%lld,%lld", strides, strides + 1, strides + 2) != 3) {
    throw std::runtime_error("strides");
  }
  const int64_t count = B * tokens * C;
  const int64_t room = (B - 1) * strides[0] + (tokens - 1) * strides[1] + (C - 1) * strides[2] + 1;
  std::ifstream in(arguments[7], std::ios::binary);
  const auto w = read<S>(in, C), u = read<S>(in, C);
  const auto k = read<T>(in, room), v = read<T>(in, room), gy = read<T>(in, room);
  const auto view = [&](const std::unique_ptr<T[]>& x) {
    return View<const T>{x.get(), strides[0], strides[1], strides[2]};
  };
  const auto result = [&](const std::unique_ptr<T[]>& x) { return View<T>{x.get(), tokens * C, C, 1}; };
  const gpu::Problem<T> problem{B, tokens, C, w.get(), u.get(), view(k), view(v)};
  const emulator::Launch launch(order, 1);
  const auto y = make<T>(count), gk = make<T>(count), gv = make<T>(count);
  const auto gw = make<S>(C), gu = make<S>(C);
  const auto states = make<S>(states_size(B, tokens, C)), workspace = make<S>(workspace_size(B, tokens, C));
  forward(launch, problem, result(y), states.get());
  backward(launch, problem, view(gy), result(gk), result(gv), gw.get(), gu.get(), states.get(), workspace.get());
  std::ofstream out(arguments[8], std::ios::binary);
  write(out, y, count);
  write(out, gw, C);
  write(out, gu, C);
  write(out, gk, count);
  write(out, gv, count);
}

int main(int count, char** arguments) {
  if (count != 9) return 2;
  const std::string type = arguments[1];
  try {
    if (type == "float") run<float>(arguments);
    if (type == "double") run<double>(arguments);
    if (type == "half") run<__half>(arguments);
    if (type == "bfloat16") run<__nv_bfloat16>(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
