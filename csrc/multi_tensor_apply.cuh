// The CUDA loop over one tile: 128-bit loads, a functor, 128-bit stores. It knows memory; not Adam.
#pragma once

#include <cstdint>

#include "streams.h"
#include "tensor_table.h"

namespace adamprox {

constexpr int kThreads = 256;
constexpr int kPerThread = kTileSize / kThreads;
constexpr int kBlocksPerMultiprocessor = 2;  // so 128 registers a thread; nothing spills

// The place in a tile of the calling thread's element i: vectors of kWidth elements, a block's width
// apart, so that neighbouring threads touch neighbouring memory.
template <int kWidth>
__device__ __forceinline__ int64_t place_in_tile(int i) {
  return (i / kWidth) * (kThreads * kWidth) + threadIdx.x * kWidth + i % kWidth;
}

// Where a tile lies in its tensor, and how it may be read.
struct TileRange {
  int64_t begin;
  int64_t end;   // of the tensor, or of the tile where that comes first
  bool vectors;  // a full tile of aligned tensors: no bounds to check, so accesses are 128-bit
};

template <typename Storage, int kWidth>
struct alignas(16) Vector {
  Storage element[kWidth];
};

// What one thread holds of a stream at a time: kVectors of the places above.
template <int kWidth, int kVectors, typename Stream>
struct Held {
  using Storage = typename Stream::Element;
  using T = typename Stream::T;
  Stream stream;
  T value[kVectors * kWidth];

  __device__ __forceinline__ void load(const TileRange& range, int first) {
#pragma unroll
    for (int i = 0; i < kVectors * kWidth; i += kWidth) {
      const int64_t at = range.begin + place_in_tile<kWidth>(first + i);
      if (range.vectors) {
        const auto vector = *reinterpret_cast<const Vector<Storage, kWidth>*>(stream.data + at);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) value[i + j] = Convert<Storage>::widen(vector.element[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          value[i + j] = at + j < range.end ? stream.load(at + j) : T(0);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const TileRange& range, int first) const {
    if constexpr (Stream::kWritten) {
#pragma unroll
      for (int i = 0; i < kVectors * kWidth; i += kWidth) {
        const int64_t at = range.begin + place_in_tile<kWidth>(first + i);
        if (range.vectors) {
          Vector<Storage, kWidth> vector;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            vector.element[j] = Convert<Storage>::narrow(value[i + j]);
          }
          *reinterpret_cast<Vector<Storage, kWidth>*>(stream.data + at) = vector;
        } else {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            if (at + j < range.end) stream.store(at + j, value[i + j]);
          }
        }
      }
    }
  }
};

// Calls f(i, element...) for the calling thread's elements of a tile, i from 0 to kPerThread - 1;
// its streams' elements are loaded before and stored after.
template <int kWidth, typename F, typename... Streams>
__device__ __forceinline__ void for_each_in_tile(const TileRange& range, F f, Streams... streams) {
  // Two vectors of each stream at a time: enough loads in flight, and not more registers than that.
  constexpr int kVectors = kPerThread / kWidth < 2 ? 1 : 2;
  const auto run = [&](int first, auto... held) {
    (held.load(range, first), ...);
#pragma unroll
    for (int i = 0; i < kVectors * kWidth; ++i) {
      if (range.vectors || range.begin + place_in_tile<kWidth>(first + i) < range.end) {
        f(first + i, held.value[i]...);
      }
    }
    (held.store(range, first), ...);
  };
#pragma unroll
  for (int first = 0; first < kPerThread; first += kVectors * kWidth) {
    run(first, Held<kWidth, kVectors, Streams>{streams, {}}...);
  }
}

}  // namespace adamprox
