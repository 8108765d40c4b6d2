// BiWKV on a GPU: which kernels run, in which order. `Launch` starts a kernel:
// launch(kernel, dim3 blocks, dim3 threads, shared bytes, arguments...), one after the other.
#pragma once

#include "biwkv_kernels.cuh"

namespace lalic::gpu {

// Rows of a block, and tokens of a thread: eight keep what the backward needs of them in 128 registers.
template <class T>
using TileOf = Tile<T, 8, 8>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tiles_of(int64_t tokens) { return divide_up(tokens, TileOf<float>::kTile); }

// Scalars that `forward` leaves in `states` for `backward`, and that `backward` needs to work with.
inline int64_t states_size(int64_t samples, int64_t tokens, int64_t channels) {
  return samples * tiles_of(tokens) * 6 * channels;
}
inline int64_t workspace_size(int64_t samples, int64_t tokens, int64_t channels) {
  return samples * tiles_of(tokens) * (tiles_of(tokens) > 1 ? 8 : 2) * channels;
}

inline dim3 groups_of(int64_t channels, unsigned y, unsigned z) {
  return dim3(unsigned(divide_up(channels, kLanes)), y, z);
}

inline int64_t slabs_of(int64_t tokens) { return divide_up(tiles_of(tokens), kSlab); }

inline dim3 tile_grid(int64_t samples, int64_t tokens, int64_t channels) {
  const int64_t tiles = tiles_of(tokens);
  return groups_of(channels, unsigned(tiles < kSlab ? tiles : kSlab), unsigned(samples * slabs_of(tokens)));
}

// Whether a call of this shape fits the grid that CUDA allows.
inline bool fits_grid(int64_t samples, int64_t tokens, int64_t channels) {
  return tiles_of(tokens) < INT32_MAX && samples * slabs_of(tokens) <= 65535 && divide_up(channels, kLanes) < INT32_MAX;
}

template <class T, class Launch>
void connect(const Launch& launch, const Problem<T>& problem, const TileStates<Scalar<T>>& states) {
  launch(connect_tiles<Scalar<T>>, groups_of(problem.channels, 2, unsigned(problem.samples)),
         dim3(kLanes, kConnectRows), ConnectRows<Scalar<T>>::kBytes, problem.w, TileOf<T>::kTile, states);
}

// `states` holds states_size scalars, and after it the sums that arrive at every tile (undefined for a single one).
template <class T, class Launch>
void forward(const Launch& launch, const Problem<T>& problem, const View<T>& y, Scalar<T>* states_data) {
  using Tile = TileOf<T>;
  const dim3 threads(kLanes, Tile::kRows), blocks = tile_grid(problem.samples, problem.tokens, problem.channels);
  const TileStates<Scalar<T>> states{states_data, tiles_of(problem.tokens), problem.channels};
  if (states.tiles > 1) {
    launch(summaries<Tile>, blocks, threads, TileRows<Tile>::kBytes, problem, states);
    connect(launch, problem, states);
  }
  launch(outputs<Tile>, blocks, threads, TileRows<Tile>::kBytes, problem, states, y);
}

// `states` is what `forward` left, `workspace` holds workspace_size scalars.
template <class T, class Launch>
void backward(const Launch& launch, const Problem<T>& problem, const View<const T>& gy, const View<T>& gk,
              const View<T>& gv, Scalar<T>* gw, Scalar<T>* gu, Scalar<T>* states_data, Scalar<T>* workspace) {
  using Tile = TileOf<T>;
  using S = Scalar<T>;
  const dim3 threads(kLanes, Tile::kRows), blocks = tile_grid(problem.samples, problem.tokens, problem.channels);
  const int64_t tiles = tiles_of(problem.tokens), count = problem.samples * tiles;
  S* const parts = workspace;
  const TileStates<S> states{states_data, tiles, problem.channels};
  const TileStates<S> g_states{parts + count * 2 * problem.channels, tiles, problem.channels};
  if (tiles > 1) {
    launch(gradient_sums<Tile>, blocks, threads, TileRows<Tile>::kBytes, problem, states, gy, g_states);
    connect(launch, problem, g_states);
  }
  launch(gradients<Tile>, blocks, threads, TileRows<Tile>::kBytes, problem, states, gy, g_states, gk, gv, parts);
  launch(reduce<S>, groups_of(problem.channels, 2, 1), dim3(kLanes, kReduceRows),
         int(kLanes * kReduceRows * sizeof(double)), static_cast<const S*>(parts), count, problem.channels, gw, gu);
}

}  // namespace lalic::gpu
