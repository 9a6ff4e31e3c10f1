// The CUDA loop over a chunk: 128-bit loads, a functor, 128-bit stores. It knows memory; not Adam.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "streams.h"
#include "tensor_table.h"

namespace adamprox {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Who works on a chunk together: all threads of a block, which is known when it is compiled, or those
// of a block or a warp.
struct Block {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return kThreads; }
};
struct Team {
  bool is_block;
  __device__ __forceinline__ int thread() const {
    return is_block ? threadIdx.x : threadIdx.x % kWarp;
  }
  __device__ __forceinline__ int size() const { return is_block ? kThreads : kWarp; }
};

// What for_each_element calls: f(i, element...), i counting from 0 within a vector. Of one that is
// kTogether, whole warps also call finish<kWidth>(first, at, end) after each of their vectors, the
// warp's and the thread's own, and the block finish_rest<kWidth>(first) after what fills no vector.
template <typename F>
struct EachAlone : F {
  static constexpr bool kTogether = false;
};
template <typename F>
EachAlone(F) -> EachAlone<F>;

// A stream that is touched once a step: in the L2 cache it makes room for those that are not.
template <typename Stream>
struct Once : Stream {};

// A stream that may be missing: then it reads minus infinity, and is not written.
template <typename Stream>
struct Optional : Stream {
  bool present;
};

template <typename Stream>
struct IsOptional : std::false_type {};
template <typename Stream>
struct IsOptional<Optional<Stream>> : std::true_type {};

template <typename Stream>
struct IsOnce : std::false_type {};
template <typename Stream>
struct IsOnce<Once<Stream>> : std::true_type {};
template <typename Stream>
struct IsOnce<Optional<Stream>> : IsOnce<Stream> {};

// What one thread holds of a stream at a time, as it is stored: kVectors times kWidth elements.
//
// A vector moves as 128-bit words, by intrinsics: plain accesses are taken apart for sm_100 and
// later (CUDA 13.0).
template <int kVectors, int kWidth, typename Stream>
struct Held {
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
  Elements vector;           // that is being worked on
  typename Stream::T value;  // the element of it

  __device__ __forceinline__ bool present() const {
    if constexpr (IsOptional<Stream>::value) return stream.present;
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
        loaded[v].at[i] = IsOnce<Stream>::value ? __ldcs(from) : __ldcg(from);
      }
    }
  }

  __device__ __forceinline__ void open_vector(int v) { vector = bit_cast<Elements>(loaded[v]); }

  __device__ __forceinline__ void open(int i) {
    using T = typename Stream::T;
    value = present() ? Convert<Storage>::widen(vector.at[i]) : static_cast<T>(-INFINITY);
  }

  __device__ __forceinline__ void close(int i) {
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
          IsOnce<Stream>::value ? __stcs(to, words.at[i]) : __stcg(to, words.at[i]);
        }
      }
    }
  }
};

// Vectors of the calling thread from `at` to `end`, a team's width apart, so that neighbouring
// threads touch neighbouring memory; kVectors at a time, whose loads are all under way before the
// first one is needed. Of one at a time, those of the next are, while it is worked on, but for warps
// that sum, which have no registers for it. Past the end, one before it is loaded again, the warp's
// first if it sums: a branch would divide the loads, and a loop of its own for what is left double
// the code. The threads of a warp that sums stay together to the end.
template <int kVectors, int kWidth, typename Team, typename F, typename... Streams>
__device__ __forceinline__ void for_each_vector(Team team, int at, int end, F f,
                                                Streams... streams) {
  constexpr bool kAhead = kVectors == 1 && !F::kTogether;
  const int stride = team.size() * kWidth;
  const int behind = F::kTogether ? threadIdx.x % kWarp * kWidth : 0;  // the warp's first thread
  if (at - behind >= end) return;
  const auto run = [&](auto... held) {
    const auto load = [&](int v, int from) {
      (held.load(v, from < end ? from : at - behind), ...);
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
          (held.open_vector(v), ...);
          if constexpr (kAhead) load(v, here + stride);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            (held.open(i), ...);
            f(i, held.value...);
            (held.close(i), ...);
          }
          (held.store(here), ...);
        }
        if constexpr (F::kTogether) {
          if (here - behind < end) f.template finish<kWidth>(here - behind, here, end);
        }
      }
    }
  };
  run(Held<kVectors, kWidth, Streams>{streams, {}, {}, {}}...);
}

// Calls f(i, element...) for `count` elements of the streams, which point to the first ones: they
// are loaded before and stored after. `aligned`: the streams are, at 16 bytes. All threads of a
// team call it.
template <typename Team, typename F, typename First, typename... Streams>
__device__ __forceinline__ void for_each_element(Team team, int count, bool aligned, F f,
                                                 First first, Streams... streams) {
  constexpr int kSize = sizeof(typename First::Element);  // no other stream's is smaller
  constexpr int kWidth = sizeof(uint4) / kSize;
  // For 4 to 8 loads of 128 bits in flight, beside those of an optional stream; more would spill.
  constexpr int kLoads =
      (kSize + ... + (IsOptional<Streams>::value ? 0 : sizeof(typename Streams::Element))) / kSize;
  constexpr int kVectors = kLoads == 1 ? 4 : F::kTogether && kLoads <= 4 ? 2 : 1;
  const int in_vectors = aligned ? count - count % kWidth : 0;
  if (in_vectors < count) {  // first: where warps sum, they need what is left
    for_each_vector<1, 1>(team, in_vectors + team.thread(), count, f, first, streams...);
    if constexpr (F::kTogether) f.template finish_rest<kWidth>(in_vectors);
  }
  for_each_vector<kVectors, kWidth>(team, team.thread() * kWidth, in_vectors, f, first, streams...);
}

}  // namespace adamprox
