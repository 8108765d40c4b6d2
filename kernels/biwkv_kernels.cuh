// BiWKV on a GPU: the kernels.
//
//   summaries       per tile of tokens: its sums as seen from its two ends
//   connect_tiles   along the tiles: the sums that arrive at each tile from the left and from the right
//   outputs         per tile: y                                                (forward)
//   gradient_sums   per tile: the sums of gN, gD as seen from its two ends     (backward; connect_tiles again)
//   gradients       per tile: gk, gv, and its part of gw, gu
//   reduce          gw, gu: the sum of the parts, in a fixed order
//
// A block is kLanes channels (a warp, reading neighbouring addresses) by kRows rows of threads, and has a tile of
// kRows * kTokens tokens. Each thread has a run of kTokens tokens in registers; the runs' sums meet in shared memory,
// where one warp per direction goes along the rows. A sequence of one tile takes `outputs` or `gradients` alone. Every
// block does its own part, in a fixed order: bits do not depend on the schedule, and there are no atomics.
#pragma once

#include "biwkv_block.cuh"

namespace lalic::gpu {

template <class Tile>
using TileRun = Run<typename Tile::Element, Tile::kTokens>;

template <class Tile>
using TileRows = RowStates<typename Tile::S, typename Tile::S, Tile::kRows, 2>;

// Row 0 of threads connects the rows from the left, row 1 from the right.
template <class Tile, class S>
__device__ __forceinline__ State<S> connect_side(const Place<Tile>& at, const TileRows<Tile>& rows, S step,
                                                 const State<S>& arriving) {
  return at.row == kLeft ? rows.template connect<kLeft>(at.lane, step, arriving)
                         : rows.template connect<kRight>(at.lane, step, arriving);
}

// The sums arriving at this thread's run, from the runs' own sums and those arriving at the tile (if there is more than
// one). All threads of the block call it. After it each thread's own place in `rows` is free for what comes next.
template <class Tile, class S>
__device__ __forceinline__ void connect_rows(const Place<Tile>& at, const TileRows<Tile>& rows,
                                             const TileStates<S>& tiles, int64_t channels, S w, State<S>& left,
                                             State<S>& right) {
  rows.store(kLeft, at.row, at.lane, left);
  rows.store(kRight, at.row, at.lane, right);
  __syncthreads();
  if (at.row < 2) {
    State<S> arriving = empty_state<S>();
    if (at.tiles > 1 && at.channel < channels) arriving = tiles.load(at.b, at.tile, at.row, at.channel);
    connect_side(at, rows, w * S(Tile::kTokens), arriving);
  }
  __syncthreads();
  left = rows.load(kLeft, at.row, at.lane);
  right = rows.load(kRight, at.row, at.lane);
}

// The tile's sums from those of its runs. All threads of the block call it.
template <class Tile, class S>
__device__ __forceinline__ void summarise_rows(const Place<Tile>& at, const TileRows<Tile>& rows,
                                               const TileStates<S>& tiles, int64_t channels, S w,
                                               const State<S>& left, const State<S>& right) {
  rows.store(kLeft, at.row, at.lane, left);
  rows.store(kRight, at.row, at.lane, right);
  __syncthreads();
  if (at.row < 2) {
    const State<S> whole = connect_side(at, rows, w * S(Tile::kTokens), empty_state<S>());
    if (at.channel < channels) tiles.store(at.b, at.tile, at.row, at.channel, whole);
  }
}

// The exponent that a run's fast path refers to: the largest weight that reaches it.
template <class S>
__device__ __forceinline__ S reference(S top, const State<S>& left, const State<S>& right) {
  return Math<S>::max(top, Math<S>::max(left.m, right.m));
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    summaries(const Problem<typename Tile::Element> problem, const TileStates<typename Tile::S> states) {
  using S = typename Tile::S;
  LALIC_SHARED(unsigned char, shared);
  const Place<Tile> at(problem.tokens, false);
  if (!at.exists()) return;
  const TileRun<Tile> run(problem, at.where());
  State<S> left, right;
  run.sums(left, right);
  const TileRows<Tile> rows(shared);
  summarise_rows<Tile, S>(at, rows, states, problem.channels, run.w, left, right);
}

// Rows of a block of `connect_tiles`: each goes along its share of the tiles. Grid: groups of channels, sides, samples.
constexpr int kConnectRows = 16;

template <class S>
using ConnectRows = RowStates<S, double, kConnectRows, 1>;

template <class S>
__global__ void __launch_bounds__(kLanes* kConnectRows)
    connect_tiles(const S* w, int tile_tokens, const TileStates<S> states) {
  LALIC_SHARED(unsigned char, shared);
  const ConnectRows<S> rows(shared);
  const int side = blockIdx.y, lane = threadIdx.x, row = threadIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * kLanes + lane, b = blockIdx.z;
  const bool inside = channel < states.channels;
  const int tiles = int(states.tiles), share = (tiles + kConnectRows - 1) / kConnectRows;
  const int first = row * share, last = first + share < tiles ? first + share : tiles;
  const double step = double(inside ? w[channel] : 0) * tile_tokens;

  const auto walk = [&](State<S, double> state, bool write) {
    for (int i = first; inside && i < last; ++i) {
      const int tile = side == kLeft ? i : tiles - 1 - i;
      const State<S> own = states.load(b, tile, side, channel);
      if (write) states.store(b, tile, side, channel, {state.num, state.den, S(state.m)});
      decay(state, step);
      state = join(state, State<S, double>{own.num, own.den, double(own.m)});
    }
    return state;
  };
  // Either side's rows go up: they stand in its direction.
  rows.store(kLeft, row, lane, walk(empty_state<S, double>(), false));
  __syncthreads();
  if (row == 0) rows.template connect<kLeft>(lane, step * double(share), empty_state<S, double>());
  __syncthreads();
  walk(rows.load(kLeft, row, lane), true);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    outputs(const Problem<typename Tile::Element> problem, const TileStates<typename Tile::S> states,
            const View<typename Tile::Element> y_all) {
  using T = typename Tile::Element;
  using S = typename Tile::S;
  LALIC_SHARED(unsigned char, shared);
  const Place<Tile> at(problem.tokens, true);
  if (!at.exists()) return;
  TileRun<Tile> run(problem, at.where());
  State<S> left, right;
  run.sums(left, right);
  const TileRows<Tile> rows(shared);
  connect_rows<Tile, S>(at, rows, states, problem.channels, run.w, left, right);
  if (run.length == 0) return;
  const Column<T> y(y_all, at.where());
  const S m = reference(run.top, left, right);
  if (run.fits_under(m)) {
    Sums<S> rights[Tile::kTokens], before = in_units_of(left, m);
    run.refer_to(m);
    run.right_sums(in_units_of(right, m), rights);
#pragma unroll
    for (int j = 0; j < Tile::kTokens; ++j) {
      y[j] = Element<T>::store(run.output_of(j, before, rights[j]).y);
      push(before, run.q, run.E[j] * run.x[j], run.E[j]);
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < run.length; ++j) {
      State<S> l = left, r = right;
      run.sides_wide(j, l, r);
      const State<S> total = run.total_wide(j, l, r);
      y[j] = Element<T>::store(Math<S>::divide(total.num, total.den));
    }
  }
}

// The sums of g of this thread's run, of which `left` and `right` arrive; whether its fast path holds, with `m`, `rights`
// and `g` of every token.
template <class Tile, class S>
__device__ __forceinline__ bool gradient_sums_of(TileRun<Tile>& run,
                                                 const GradientRun<typename Tile::Element, Tile::kTokens>& gradient,
                                                 S m, Sums<S>* rights, Sums<S>* g, State<S>& g_left,
                                                 State<S>& g_right) {
  const bool fast = run.fits_under(m);
  if (fast) {
    run.refer_to(m);
    run.right_sums(in_units_of(gradient.right, m), rights);
    gradient.sums(m, rights, g, g_left, g_right);
  } else {
    gradient.sums_wide(g_left, g_right);
  }
  return fast;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    gradient_sums(const Problem<typename Tile::Element> problem, const TileStates<typename Tile::S> states,
                  const View<const typename Tile::Element> gy_all, const TileStates<typename Tile::S> g_states) {
  using S = typename Tile::S;
  LALIC_SHARED(unsigned char, shared);
  const Place<Tile> at(problem.tokens, true);
  if (!at.exists()) return;
  TileRun<Tile> run(problem, at.where());
  State<S> left, right;
  run.sums(left, right);
  const TileRows<Tile> rows(shared);
  connect_rows<Tile, S>(at, rows, states, problem.channels, run.w, left, right);

  State<S> g_left = empty_state<S>(), g_right = g_left;
  if (run.length > 0) {
    const GradientRun<typename Tile::Element, Tile::kTokens> gradient{
        run, {gy_all, at.where()}, left, right};
    Sums<S> rights[Tile::kTokens], g[Tile::kTokens];
    gradient_sums_of<Tile, S>(run, gradient, reference(run.top, left, right), rights, g, g_left, g_right);
  }
  summarise_rows<Tile, S>(at, rows, g_states, problem.channels, run.w, g_left, g_right);
}

// parts: (B, tiles, 2, C), gw and gu of each tile.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    gradients(const Problem<typename Tile::Element> problem, const TileStates<typename Tile::S> states,
              const View<const typename Tile::Element> gy_all, const TileStates<typename Tile::S> g_states,
              const View<typename Tile::Element> gk_all, const View<typename Tile::Element> gv_all,
              typename Tile::S* const parts) {
  using S = typename Tile::S;
  LALIC_SHARED(unsigned char, shared);
  const Place<Tile> at(problem.tokens, false);
  if (!at.exists()) return;
  TileRun<Tile> run(problem, at.where());
  State<S> left, right;
  run.sums(left, right);
  const TileRows<Tile> rows(shared);
  connect_rows<Tile, S>(at, rows, states, problem.channels, run.w, left, right);

  const GradientRun<typename Tile::Element, Tile::kTokens> gradient{
      run, {gy_all, at.where()}, left, right};
  const S m = reference(run.top, left, right);
  State<S> g_left = empty_state<S>(), g_right = g_left;
  Sums<S> rights[Tile::kTokens], g[Tile::kTokens];
  bool fast = false;
  if (run.length > 0) fast = gradient_sums_of<Tile, S>(run, gradient, m, rights, g, g_left, g_right);
  connect_rows<Tile, S>(at, rows, g_states, problem.channels, run.w, g_left, g_right);

  S gw = 0, gu = 0;
  if (run.length > 0) {
    const Column<typename Tile::Element> gk(gk_all, at.where());
    const Column<typename Tile::Element> gv(gv_all, at.where());
    if (fast && Math<S>::max(g_left.m, g_right.m) + m <= 2 * Range<S>::spread - 10) {
      gradient.differentiate(m, rights, g, g_left, g_right, gk, gv, gw, gu);
    } else {
      gradient.differentiate_wide(g_left, g_right, gk, gv, gw, gu);
    }
  }
  // The rows' parts, added in their order.
  rows.store(kLeft, at.row, at.lane, {gw, gu, S(0)});
  __syncthreads();
  if (at.row < 2 && at.channel < problem.channels) {
    S total = 0;
    for (int row = 0; row < Tile::kRows; ++row) {
      const State<S> part = rows.load(kLeft, row, at.lane);
      total += at.row == 0 ? part.num : part.den;
    }
    parts[((at.b * at.tiles + at.tile) * 2 + at.row) * problem.channels + at.channel] = total;
  }
}

constexpr int kReduceRows = 32;

// gw, gu: (C,), the sums of (count, 2, C) parts, in double and in a fixed order. Grid: groups of channels, gw and gu.
template <class S>
__global__ void __launch_bounds__(kLanes* kReduceRows)
    reduce(const S* parts, int64_t count, int64_t channels, S* gw, S* gu) {
  LALIC_SHARED(double, sums);
  const int which = blockIdx.y, lane = threadIdx.x, row = threadIdx.y;
  const int64_t channel = int64_t(blockIdx.x) * kLanes + lane;
  double sum = 0;
  if (channel < channels) {
    for (int64_t i = row; i < count; i += kReduceRows) sum += double(parts[(i * 2 + which) * channels + channel]);
  }
  sums[row * kLanes + lane] = sum;
  __syncthreads();
  if (row > 0 || channel >= channels) return;
  for (int i = 1; i < kReduceRows; ++i) sum += sums[i * kLanes + lane];
  (which == 0 ? gw : gu)[channel] = S(sum);
}

}  // namespace lalic::gpu
