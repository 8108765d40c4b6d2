// BiWKV on a GPU: where a block is, and where it keeps the sums that its threads and the other blocks need: in shared
// memory, one state per row of threads, and in global memory, one per tile of tokens.
#pragma once

#include "biwkv_run.cuh"

#if !defined(LALIC_SHARED)
// Dynamic shared memory of one block, as an array of T.
#define LALIC_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char lalic_shared[]; \
  T* const name = reinterpret_cast<T*>(lalic_shared)
#endif

namespace lalic::gpu {

constexpr int kLanes = 32;

template <class T, int kRows_, int kTokens_>
struct Tile {
  using Element = T;
  using S = Scalar<T>;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kTile = kRows * kTokens;
  static constexpr int kThreads = kLanes * kRows;
  static_assert(kRows >= 2, "one row of threads per direction goes along the rows");
};

enum Side { kLeft = 0, kRight = 1 };

// One state per tile, side and channel in global memory, (B, tiles, 2, 3, C): num, den, m; channels side by side.
template <class S>
struct TileStates {
  S* data;
  int64_t tiles, channels;

  __device__ __forceinline__ S* place(int64_t b, int64_t tile, int side, int64_t c) const {
    return data + ((b * tiles + tile) * 2 + side) * 3 * channels + c;
  }
  __device__ __forceinline__ State<S> load(int64_t b, int64_t tile, int side, int64_t c) const {
    const S* at = place(b, tile, side, c);
    return {at[0], at[channels], at[2 * channels]};
  }
  __device__ __forceinline__ void store(int64_t b, int64_t tile, int side, int64_t c, const State<S>& state) const {
    S* at = place(b, tile, side, c);
    at[0] = state.num;
    at[channels] = state.den;
    at[2 * channels] = state.m;
  }
};

// One state per row, side and lane in shared memory.
template <class S, class M, int kRows, int kSides>
struct RowStates {
  M* m;     // [side][row][lane]
  S* sums;  // [side][num, den][row][lane]

  static constexpr int kBytes = kSides * kRows * kLanes * int(2 * sizeof(S) + sizeof(M));

  __device__ __forceinline__ explicit RowStates(unsigned char* shared)
      : m(reinterpret_cast<M*>(shared)), sums(reinterpret_cast<S*>(shared + kSides * kRows * kLanes * sizeof(M))) {}

  __device__ __forceinline__ State<S, M> load(int side, int row, int lane) const {
    const S* at = sums + (side * 2 * kRows + row) * kLanes + lane;
    return {at[0], at[kRows * kLanes], m[(side * kRows + row) * kLanes + lane]};
  }
  __device__ __forceinline__ void store(int side, int row, int lane, const State<S, M>& state) const {
    S* at = sums + (side * 2 * kRows + row) * kLanes + lane;
    at[0] = state.num;
    at[kRows * kLanes] = state.den;
    m[(side * kRows + row) * kLanes + lane] = state.m;
  }

  // Replaces the sums of the rows of one side and lane with those arriving at each row; the sums of all are returned.
  // `step` is the decay over one row. The rows go up for kLeft and down for kRight.
  template <int kSide>
  __device__ __forceinline__ State<S, M> connect(int lane, M step, State<S, M> state) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = kSide == kLeft ? i : kRows - 1 - i;
      const State<S, M> own = load(kSide, row, lane);
      store(kSide, row, lane, state);
      decay(state, step);
      state = join(state, own);
    }
    return state;
  }
};

#if !defined(LALIC_TILES_PER_SLAB)
#define LALIC_TILES_PER_SLAB 32768
#endif
// Tiles along one dimension of the grid, which has 65535 places at most.
constexpr unsigned kSlab = LALIC_TILES_PER_SLAB;

// Where a block is. Grid: groups of channels (so that neighbours in time are neighbours in memory), tiles of a slab, samples
// x slabs. `backwards` starts with the last tile of the last sample, which the kernel before left in the cache.
template <class Tile>
struct Place {
  int64_t b, tile;
  unsigned tiles;
  int64_t channel;
  int lane, row;

  __device__ __forceinline__ Place(int64_t tokens, bool backwards) {
    const unsigned y = backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
    const unsigned z = backwards ? gridDim.z - 1 - blockIdx.z : blockIdx.z;
    tiles = unsigned((tokens + Tile::kTile - 1) / Tile::kTile);
    lane = threadIdx.x;
    row = threadIdx.y;
    channel = int64_t(blockIdx.x) * kLanes + lane;
    tile = y;
    b = z;
    if (tiles > kSlab) {
      const unsigned slabs = (tiles + kSlab - 1) / kSlab;
      b = z / slabs;
      tile += int64_t(z % slabs) * kSlab;
    }
  }
  // In the last slab the grid may be larger than what there is to do.
  __device__ __forceinline__ bool exists() const { return tile < tiles; }
  __device__ __forceinline__ Where where() const {
    return {b, tile * Tile::kTile, channel - lane, unsigned(row * Tile::kTokens), unsigned(lane)};
  }
};

}  // namespace lalic::gpu
