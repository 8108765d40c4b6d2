// BiWKV on a GPU: which kernels run, in which order, over which workspace. `Launch` starts a kernel:
// launch(kernel, blocks, dim3 threads, shared bytes, arguments...), in order, one after the other.
#pragma once

#include "biwkv_kernels.cuh"

namespace lalic::gpu {

// Tokens of a thread and rows of a block. The backward keeps more per token: fewer threads let more blocks run side by side.
constexpr int kRunTokens = 8, kForwardRows = 16, kBackwardRows = 8;

template <class T>
using ForwardTile = Tile<T, kForwardRows, kRunTokens>;
template <class T>
using BackwardTile = Tile<T, kBackwardRows, kRunTokens>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Tile, class T>
int64_t tiles_of(const Problem<T>& problem) {
  return divide_up(problem.tokens, Tile::kTile);
}

template <class T>
int64_t groups_of(const Problem<T>& problem) {
  return divide_up(problem.channels, kLanes);
}

// Scalars of workspace that `forward` and `backward` need.
template <class T>
int64_t forward_workspace(const Problem<T>& problem) {
  const int64_t tiles = tiles_of<ForwardTile<T>>(problem);
  return tiles > 1 ? problem.samples * tiles * 6 * problem.channels : 0;
}

template <class T>
int64_t backward_workspace(const Problem<T>& problem) {
  const int64_t tiles = tiles_of<BackwardTile<T>>(problem);
  return problem.samples * tiles * (tiles > 1 ? 14 : 2) * problem.channels;
}

// The most blocks of one launch: callers refuse more.
template <class T>
int64_t most_blocks(const Problem<T>& problem) {
  return problem.samples * tiles_of<BackwardTile<T>>(problem) * groups_of(problem);
}

template <class Tile, class Launch>
void connect(const Launch& launch, const Problem<typename Tile::Element>& problem,
             const TileStates<typename Tile::S>& states) {
  using S = typename Tile::S;
  launch(connect_tiles<S>, problem.samples * groups_of(problem) * 2, dim3(kLanes, kConnectRows),
         ConnectRows<S>::kBytes, problem.w, Tile::kTile, states);
}

template <class T, class Launch>
void forward(const Launch& launch, const Problem<T>& problem, const View<T>& y, Scalar<T>* workspace) {
  using Tile = ForwardTile<T>;
  const dim3 threads(kLanes, Tile::kRows);
  const int shared = TileRows<Tile>::kBytes;
  const TileStates<Scalar<T>> states{workspace, tiles_of<Tile>(problem), problem.channels};
  const int64_t blocks = problem.samples * states.tiles * groups_of(problem);
  if (states.tiles > 1) {
    launch(summaries<Tile>, blocks, threads, shared, problem, states);
    connect<Tile>(launch, problem, states);
  }
  launch(outputs<Tile>, blocks, threads, shared, problem, states, y);
}

template <class T, class Launch>
void backward(const Launch& launch, const Problem<T>& problem, const View<const T>& gy, const View<T>& gk,
              const View<T>& gv, Scalar<T>* gw, Scalar<T>* gu, Scalar<T>* workspace) {
  using Tile = BackwardTile<T>;
  using S = Scalar<T>;
  const dim3 threads(kLanes, Tile::kRows);
  const int shared = TileRows<Tile>::kBytes;
  const int64_t tiles = tiles_of<Tile>(problem), count = problem.samples * tiles;
  const int64_t blocks = count * groups_of(problem);
  S* const parts = workspace;
  const TileStates<S> states{parts + count * 2 * problem.channels, tiles, problem.channels};
  const TileStates<S> g_states{states.data + count * 6 * problem.channels, tiles, problem.channels};
  if (tiles > 1) {
    launch(summaries<Tile>, blocks, threads, shared, problem, states);
    connect<Tile>(launch, problem, states);
    launch(gradient_sums<Tile>, blocks, threads, shared, problem, states, gy, g_states);
    connect<Tile>(launch, problem, g_states);
  }
  launch(gradients<Tile>, blocks, threads, shared, problem, states, gy, g_states, gk, gv, parts);
  launch(reduce<S>, groups_of(problem) * 2, dim3(kLanes, kReduceRows), int(kLanes * kReduceRows * sizeof(double)),
         static_cast<const S*>(parts), count, problem.channels, gw, gu);
}

}  // namespace lalic::gpu
