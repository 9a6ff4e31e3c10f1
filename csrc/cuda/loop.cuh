// The CUDA loop over a chunk: 128-bit loads, a functor, 128-bit stores. It knows memory; not Adam.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../math/streams.h"
#include "../table.h"

namespace adamprox {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The threads that share a chunk: a block's, as the compiler knows,
struct Block {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return kThreads; }
};
// or either a block's or a warp's.
struct Team {
  bool is_block;
  __device__ __forceinline__ int thread() const {
    return is_block ? threadIdx.x : threadIdx.x % kWarp;
  }
  __device__ __forceinline__ int size() const { return is_block ? kThreads : kWarp; }
};

// for_each_element calls f(i, element...) for the elements of a vector, i from 0 on. A functor that
// sums by warps is also called by whole warps: finish<kWidth>(first, at, end) after each vector,
// `first` being where the warp's vectors begin and `at` where the thread's own does; and by the block:
// finish_rest<kWidth>(first) after the elements that fill no vector.
template <typename F>
struct PerElement : F {
  static constexpr bool kSumsByWarps = false;
};
template <typename F>
PerElement(F) -> PerElement<F>;

// A stream that a step touches once: the L2 cache drops it first.
template <typename Stream>
struct Streaming : Stream {
  static constexpr bool kOnce = true;
};

// A stream that may be missing: then it reads minus infinity, and is not written.
template <typename Stream>
struct Optional : Stream {
  static constexpr bool kOptional = true;
  bool present;
};

// Loads what the same block of threads has written. It reads L2, where that is.
__device__ __forceinline__ float load_written(const float* from) { return __ldcg(from); }
__device__ __forceinline__ double load_written(const double* from) { return __ldcg(from); }
template <typename T>
__device__ __forceinline__ T load_written(const T* from) {
  return bit_cast<T>(__ldcg(reinterpret_cast<const unsigned short*>(from)));
}

// A thread's vectors of a stream, kVectors times kWidth elements, in registers as they are stored.
//
// A vector moves as 128-bit words, by intrinsics: the compiler splits plain accesses for sm_100 and
// later (CUDA 13.0).
template <int kVectors, int kWidth, typename Stream>
struct Vectors {
  using Storage = typename Stream::Element;
  static constexpr int kWords = kWidth * sizeof(Storage) / sizeof(uint4);
  struct Elements {
    Storage at[kWidth];
  };
  struct Words {
    uint4 at[kWords > 0 ? kWords : 1];
  };
  Stream stream;
  std::conditional_t<kWords == 0, Elements, Words> loaded[kVectors];
  Elements vector;           // the one that is being worked on
  typename Stream::T value;  // its element

  __device__ __forceinline__ bool present() const {
    if constexpr (Stream::kOptional) return stream.present;
    return true;
  }

  __device__ __forceinline__ void load(int v, int at) {
    loaded[v] = {};
    if (!present()) return;
    if constexpr (kWords == 0) {
      loaded[v].at[0] = stream.data[at];
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4* from = reinterpret_cast<const uint4*>(stream.data + at) + i;
        loaded[v].at[i] = Stream::kOnce ? __ldcs(from) : __ldcg(from);
      }
    }
  }

  __device__ __forceinline__ void select(int v) { vector = bit_cast<Elements>(loaded[v]); }

  __device__ __forceinline__ void widen(int i) {
    using T = typename Stream::T;
    value = present() ? Convert<Storage>::widen(vector.at[i]) : static_cast<T>(-INFINITY);
  }

  __device__ __forceinline__ void narrow(int i) {
    if constexpr (Stream::kWritten) vector.at[i] = Convert<Storage>::narrow(value);
  }

  __device__ __forceinline__ void store(int at) const {
    if constexpr (Stream::kWritten) {
      if (!present()) return;
      if constexpr (kWords == 0) {
        stream.data[at] = vector.at[0];
      } else {
        const auto words = bit_cast<Words>(vector);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          uint4* to = reinterpret_cast<uint4*>(stream.data + at) + i;
          Stream::kOnce ? __stcs(to, words.at[i]) : __stcg(to, words.at[i]);
        }
      }
    }
  }
};

// The calling thread's vectors from `at` to `end`. They are a team's width apart, so that neighbouring
// threads touch neighbouring memory. All loads of kVectors vectors are under way before the first one
// is needed. With one vector at a time, the next one's loads are too; but warps that sum have no
// registers for that, and their threads stay together to the end. Past the end an earlier vector is
// loaded again, the warp's first if it sums: a branch would divide the loads, and a loop for what is
// left would double the code.
template <int kVectors, int kWidth, typename Team, typename F, typename... Streams>
__device__ __forceinline__ void for_each_vector(Team team, int at, int end, F f,
                                                Streams... streams) {
  constexpr bool kAhead = kVectors == 1 && !F::kSumsByWarps;
  const int stride = team.size() * kWidth;
  // How far the warp's first thread is behind.
  const int behind = F::kSumsByWarps ? threadIdx.x % kWarp * kWidth : 0;
  if (at - behind >= end) return;
  const auto run = [&](auto... vectors) {
    const auto load = [&](int v, int from) {
      (vectors.load(v, from < end ? from : at - behind), ...);
    };
    if constexpr (kAhead) load(0, at);
#pragma unroll 1
    for (; at - behind < end; at += kVectors * stride) {
#pragma unroll
      for (int v = 0; v < kVectors && !kAhead; ++v) load(v, at + v * stride);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int here = at + v * stride;
        if (here < end) {
          (vectors.select(v), ...);
          if constexpr (kAhead) load(v, here + stride);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            (vectors.widen(i), ...);
            f(i, vectors.value...);
            (vectors.narrow(i), ...);
          }
          (vectors.store(here), ...);
        }
        if constexpr (F::kSumsByWarps) {
          if (here - behind < end) f.template finish<kWidth>(here - behind, here, end);
        }
      }
    }
  };
  run(Vectors<kVectors, kWidth, Streams>{streams, {}, {}, {}}...);
}

// Calls f(i, element...) for `count` elements of the streams, which point to the first ones: they
// are loaded before and stored after. `aligned`: the streams are, at 16 bytes. All threads of a
// team call it. Each element is the same thread's in every loop over the same chunk.
template <typename Team, typename F, typename First, typename... Streams>
__device__ __forceinline__ void for_each_element(Team team, int count, bool aligned, F f,
                                                 First first, Streams... streams) {
  constexpr int kSize = sizeof(typename First::Element);  // no other stream's is smaller
  constexpr int kWidth = sizeof(uint4) / kSize;
  // For 4 to 8 loads of 128 bits in flight, beside those of an optional stream; more would spill.
  constexpr int kLoads =
      (kSize + ... + (Streams::kOptional ? 0 : sizeof(typename Streams::Element))) / kSize;
  constexpr int kVectors = kLoads == 1 ? 4 : F::kSumsByWarps && kLoads <= 4 ? 2 : 1;
  const int in_vectors = aligned ? count - count % kWidth : 0;
  if (in_vectors < count) {  // first: where warps sum, they need what is left
    for_each_vector<1, 1>(team, in_vectors + team.thread(), count, f, first, streams...);
    if constexpr (F::kSumsByWarps) f.template finish_rest<kWidth>(in_vectors);
  }
  for_each_vector<kVectors, kWidth>(team, team.thread() * kWidth, in_vectors, f, first, streams...);
}

}  // namespace adamprox
