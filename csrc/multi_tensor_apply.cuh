// The CUDA loop over one tile: 128-bit loads, a functor, 128-bit stores. It knows memory; not Adam.
#pragma once

#include <cstdint>
#include <type_traits>

#include "streams.h"
#include "tensor_table.h"

namespace adamprox {

constexpr int kThreads = 256;
constexpr int kPerThread = kTileSize / kThreads;
constexpr int kBlocksPerMultiprocessor = 2;  // so 128 registers a thread; nothing spills

// The place in a tile of the calling thread's element i: vectors of kWidth elements, a block's
// width apart, so that neighbouring threads touch neighbouring memory.
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

template <typename Stream>
struct IsOptional : std::false_type {};
template <typename Storage>
struct IsOptional<Optional<Storage>> : std::true_type {};

// kWidth elements as 128-bit words. By intrinsics, past L1, which has nothing to give to data that
// is touched once; and plain accesses are taken apart for sm_100 and later (CUDA 13.0).
template <typename Storage, int kWidth>
struct Vector {
  uint4 word[kWidth * sizeof(Storage) / sizeof(uint4)];

  static __device__ __forceinline__ Vector load(const Storage* from) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(word) / sizeof(uint4)); ++i) {
      vector.word[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    }
    return vector;
  }

  __device__ __forceinline__ void store(Storage* to) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(word) / sizeof(uint4)); ++i) {
      __stcg(reinterpret_cast<uint4*>(to) + i, word[i]);
    }
  }

  struct Elements {
    Storage element[kWidth];
  };
};

// What one thread holds of a stream at a time: kVectors of the places above.
template <int kWidth, int kVectors, typename Stream>
struct Held {
  using Storage = typename Stream::Element;
  using T = typename Stream::T;
  using Words = Vector<Storage, kWidth>;
  using Elements = typename Words::Elements;
  Stream stream;
  T value[kVectors * kWidth];

  __device__ __forceinline__ void load(const TileRange& range, int first) {
    if constexpr (IsOptional<Stream>::value) {
      if (stream.data == nullptr) {
#pragma unroll
        for (T& v : value) v = stream.absent;
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors * kWidth; i += kWidth) {
      const int64_t at = range.begin + place_in_tile<kWidth>(first + i);
      if (range.vectors) {
        const auto vector = bit_cast<Elements>(Words::load(stream.data + at));
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
      if (IsOptional<Stream>::value && stream.data == nullptr) return;
#pragma unroll
      for (int i = 0; i < kVectors * kWidth; i += kWidth) {
        const int64_t at = range.begin + place_in_tile<kWidth>(first + i);
        if (range.vectors) {
          Elements vector;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            vector.element[j] = Convert<Storage>::narrow(value[i + j]);
          }
          bit_cast<Words>(vector).store(stream.data + at);
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
  // Two vectors of each stream at a time keep enough loads in flight; of doubles, one: their
  // registers count twice, and none may spill.
  constexpr int kVectors = kWidth == 4 ? 2 : 1;
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
