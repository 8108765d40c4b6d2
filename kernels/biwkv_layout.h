// Where a strip's numbers are in memory: strided (B, T, C) tensors, seen as rows of one SIMD vector per token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LALIC_CAN_STREAM 1
#else
#define LALIC_CAN_STREAM 0
#endif

#include "biwkv_view.h"
#include "biwkv_wide.h"
#include "simd.h"

namespace lalic {

template <class T>
struct Problem {
  int64_t samples, tokens, channels;
  const T *w, *u;
  View<const T> k, v;
};

// Rows of one vector each, `stride` numbers apart: the tokens of a chunk, one lane per channel.
template <class T>
struct Rows {
  using Vector = typename Lanes<std::remove_const_t<T>>::Vector;
  T* data;
  int64_t stride;

  LALIC_HD Vector load(int64_t t) const {
    Vector x;
    std::memcpy(&x, data + t * stride, sizeof x);
    return x;
  }
  LALIC_HD void store(int64_t t, const Vector& x) const { std::memcpy(data + t * stride, &x, sizeof x); }
};

// Rows that are written once. Where `streaming`, past the caches: a tensor that does not fit there anyway need not
// be read from memory before it is written (a sixth of the forward's time).
template <class T>
struct Destination : Rows<T> {
  using typename Rows<T>::Vector;
  bool streaming;

  LALIC_HD void store(int64_t t, const Vector& x) const {
#if LALIC_CAN_STREAM
    if (streaming) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(this->data + t * this->stride), (__m512i)x);
      return;
    }
#endif
    Rows<T>::store(t, x);
  }
};

// A result to be written is streamed when it is larger than this: more than one core's share of common caches.
constexpr int64_t kStreamingBytes = 8 << 20;
constexpr bool kCanStream = LALIC_CAN_STREAM;

// Whether every row of x is one whole line of memory, as streaming needs it.
template <class T>
bool aligned(const View<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 64 == 0 && x.stride_t * int64_t(sizeof(T)) % 64 == 0;
}

// Asks for the lines of a block of memory in the order of their addresses, one at each `step`. Strips read every
// sixth line or so of a chunk, which the hardware's prefetcher does not follow well; a sequence it does.
struct Prefetch {
  const char* place;
  const char* row_end;
  int64_t row_bytes, stride_bytes;

  template <int kWrite = 0>
  LALIC_HD void step() {
    __builtin_prefetch(place, kWrite);
    place += 64;
    if (place >= row_end) {
      place += stride_bytes - row_bytes;
      row_end += stride_bytes;
    }
  }
};

// The place of a strip: sample b, all tokens, channels [channel, channel + kLanes). A thread takes the `group`
// blocks of channels from `first` on together, chunk by chunk.
template <class T>
class StripLayout {
 protected:
  using Vector = typename Lanes<T>::Vector;
  static constexpr int kLanes = Lanes<T>::count;

  StripLayout(int64_t samples, int64_t tokens, int64_t C, int64_t b, int64_t first, int64_t group, int64_t channel)
      : stream_(kCanStream && samples * tokens * C * int64_t(sizeof(T)) > kStreamingBytes), tokens_(tokens), C_(C),
        b_(b), first_(first), group_(group), channel_(channel), count_((tokens + kChunk - 1) / kChunk),
        lanes_(int(std::min<int64_t>(kLanes, C - channel))) {}

  int length_of(int64_t c) const { return int(std::min<int64_t>(kChunk, tokens_ - c * kChunk)); }

  // The tokens of a chunk as rows of full vectors: in place where they stand so, else copied to `room`, with
  // zeros in the lanes beyond the last channel.
  template <class Element>  // T or const T
  Rows<Element> rows(const View<Element>& x, int64_t c, Vector* room) const {
    const int64_t start = c * kChunk;
    if (lanes_ == kLanes && x.stride_c == 1) return {x.data + start * x.stride_t, x.stride_t};
    for (int t = 0; t < length_of(c); ++t) {
      room[t] = Vector{};
      for (int j = 0; j < lanes_; ++j) room[t][j] = x.at(start + t, j);
    }
    return {reinterpret_cast<T*>(room), kLanes};
  }

  // Lines that will be streamed need not be asked for.
  Prefetch prefetch(const View<T>& x, int64_t next, const Destination<T>& y) const {
    return prefetch(x, y.streaming ? -1 : next);
  }

  // This strip's share of the lines that its group of strips will touch in chunk `next` of x.
  template <class Element>
  Prefetch prefetch(const View<Element>& x, int64_t next) const {
    if (x.stride_c != 1 || next < 0 || next >= count_) {
      const auto* here = reinterpret_cast<const char*>(this);  // again and again: a line that is in the cache
      return {here, here + 64, 64, 0};
    }
    const int64_t line = (channel_ - first_) / kLanes * kChunk, size = sizeof(T);
    const auto* row = reinterpret_cast<const char*>(x.data - (channel_ - first_) +
                                                    (next * kChunk + line / group_) * x.stride_t);
    return {row + line % group_ * 64, row + group_ * 64, group_ * 64, x.stride_t * size};
  }

  // Where the rows of an output may be written; `finish` brings them home.
  Destination<T> destination(const View<T>& x, int64_t c, Vector* room) const {
    if (lanes_ < kLanes) return {{reinterpret_cast<T*>(room), kLanes}, false};
    return {{x.data + c * kChunk * x.stride_t, x.stride_t}, stream_ && aligned(x)};
  }

  void finish(const Destination<T>& from, const View<T>& x, int64_t c) const {
#if LALIC_CAN_STREAM
    if (from.streaming) _mm_sfence();  // streamed rows reach memory before other threads are told of them
#endif
    if (lanes_ == kLanes) return;
    for (int t = 0; t < length_of(c); ++t) {
      for (int j = 0; j < lanes_; ++j) x.at(c * kChunk + t, j) = from.data[t * from.stride + j];
    }
  }

  bool stream_;
  int64_t tokens_, C_, b_, first_, group_, channel_;
  int64_t count_;  // chunks
  int lanes_;      // channels
};

}  // namespace lalic
