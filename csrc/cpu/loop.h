// The CPU's loop over elements: widen, call a functor, narrow. It knows memory; not Adam.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../math/streams.h"
#include "half.h"
#include "sweeps.h"

// The turns of the loop that follows are independent of each other; in the second case they are one
// vector's, and not to be unrolled before they are made one.
#if defined(__clang__)
#define INDEPENDENT_TURNS _Pragma("clang loop vectorize(assume_safety)")
#define INDEPENDENT_TURNS_AS_A_VECTOR INDEPENDENT_TURNS
#else
#define INDEPENDENT_TURNS _Pragma("GCC ivdep")
#define INDEPENDENT_TURNS_AS_A_VECTOR _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

namespace adamprox {

// One element of a stream: loaded when it is made, stored when the functor's call is over.
template <typename Stream>
struct Slot {
  using T = typename Stream::T;
  Stream stream;
  int64_t i;
  T value;
  HOST_DEVICE Slot(Stream s, int64_t index) : stream(s), i(index), value(s.load(index)) {}
  HOST_DEVICE ~Slot() { stream.store(i, value); }
  HOST_DEVICE T& element() { return value; }
};

// A strip is a turn of a loop. Memory is prefetched so many elements ahead, since the hardware's own
// prefetching ends with each page: that is 5 to 10 % of a step in memory, and hides what else there is to
// compute. 128 to 768 elements are alike; requests in bursts of several strips do nothing.
constexpr int kStripSize = 16, kPrefetchAhead = 256;

template <typename Stream>
HOST_DEVICE void prefetch(const Stream& stream, int64_t first) {
  if constexpr (!Stream::kPrefetched) return;
  const auto* strip = reinterpret_cast<const char*>(stream.data + first);
  const int bytes = kStripSize * sizeof(typename Stream::Element);
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(strip + at);
}

template <typename F, typename... Streams>
HOST_DEVICE void for_each_in_strip(int64_t first, bool ahead, F f, Streams... streams) {
  if (ahead) (prefetch(streams, first + kPrefetchAhead), ...);
  if constexpr (sizeof...(Streams) == 1) {  // bound by instructions, of which this takes fewer
    INDEPENDENT_TURNS_AS_A_VECTOR
    for (int i = 0; i < kStripSize; ++i) f(Slot<Streams>(streams, first + i).element()...);
  } else {
    INDEPENDENT_TURNS
    for (int64_t i = first; i < first + kStripSize; ++i) f(Slot<Streams>(streams, i).element()...);
  }
}

// A batch is a few strips. A stream of float16 is converted as a batch, to and from float32 on the stack.
constexpr int kBatchSize = 4 * kStripSize;

template <typename Stream>
struct Batch {
  Stream stream;
  HOST_DEVICE Batch(Stream s, bool) : stream(s) {}
  HOST_DEVICE Stream elements() { return stream; }
};

template <bool kIsRead, bool kIsWritten>
struct Batch<Memory<Half, kIsRead, kIsWritten>> {
  using Halves = Memory<Half, kIsRead, kIsWritten>;
  struct OnStack : Memory<float, kIsRead, kIsWritten> {
    static constexpr bool kPrefetched = false;
  };
  Halves stream;
  alignas(64) float values[kBatchSize];

  HOST_DEVICE Batch(Halves s, bool ahead) : stream(s) {
    constexpr int kHalvesOfALine = 32;
    for (int first = 0; ahead && first < kBatchSize; first += kHalvesOfALine) {
      prefetch(stream, first + kPrefetchAhead);
    }
    widen(stream.data, kBatchSize, values);
  }

  HOST_DEVICE ~Batch() {
    if constexpr (kIsWritten) narrow(values, kBatchSize, stream.data);
  }

  HOST_DEVICE OnStack elements() { return {{values}}; }
};

template <typename F, typename... Batches>
HOST_DEVICE void for_each_in_batch(bool ahead, F f, Batches&&... batches) {
  for (int first = 0; first < kBatchSize; first += kStripSize) {
    for_each_in_strip(first, ahead, f, batches.elements()...);
  }
}

template <typename F, typename... Streams>
HOST_DEVICE void for_each_element(const Span& span, F f, Streams... streams) {
  const int64_t known = span.count + span.after;
  int64_t i = 0;
  if constexpr ((std::is_same_v<typename Streams::Element, Half> || ...)) {
    for (; i + kBatchSize <= span.count; i += kBatchSize) {
      const bool ahead = i + kBatchSize + kPrefetchAhead <= known;
      for_each_in_batch(ahead, f, Batch<Streams>({streams.data + i}, ahead)...);
    }
  }
  for (; i + kStripSize <= span.count; i += kStripSize) {
    for_each_in_strip(i, i + kPrefetchAhead < known, f, streams...);
  }
  for (; i < span.count; ++i) {
    asm volatile("");  // or the compiler would make vectors of so few
    f(Slot<Streams>(streams, i).element()...);
  }
}

}  // namespace adamprox
