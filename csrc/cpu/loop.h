// The CPU's loop over elements: widen, call a functor, narrow. It knows memory; not Adam.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../math/streams.h"
#include "half.h"
#include "sweeps.h"

// The turns of the loop that follows are independent of each other, and are to become a vector's.
#if defined(__clang__)
#define INDEPENDENT_TURNS _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define INDEPENDENT_TURNS _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

namespace adamprox {

// Calls f with references to an element of each stream, which are stored afterwards.
template <typename F, typename... Streams>
HOST_DEVICE void call_with_element(int64_t i, const F& f, const Streams&... streams) {
  [&](auto... values) __attribute__((always_inline)) {
    f(values...);
    (streams.store(i, values), ...);
  }(streams.load(i)...);
}

// A strip is a turn of a loop. Memory is prefetched so many elements ahead, since the hardware's own
// prefetching ends with each page: that is 5 to 10 % of a step in memory, and hides what else there is to
// compute. 128 to 768 elements ahead take the same time. Bursts of requests gain nothing. One stream alone,
// out of memory, needs more ahead, so that as many bytes are on their way (one of float16 was not tried).
// It is the second level of the caches that is asked to have them: the first has fewer requests, which
// the loop itself needs.
constexpr int kStripSize = 16, kPrefetchAhead = 256, kPrefetchAheadAlone = 1280;

template <typename Stream>
HOST_DEVICE void prefetch(const Stream& stream, int64_t first) {
  if constexpr (!Stream::kPrefetched) return;
  const auto* strip = reinterpret_cast<const char*>(stream.data + first);
  const int bytes = kStripSize * sizeof(typename Stream::Element);
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(strip + at, 0, 2);
}

// A function's own arguments, so that the compilers believe __restrict__.
template <typename... Streams, typename F>
HOST_DEVICE void for_each_of_strip(const F& f, decltype(Streams::data) __restrict__... data) {
  INDEPENDENT_TURNS
  for (int i = 0; i < kStripSize; ++i) call_with_element(i, f, Streams{data}...);
}

template <int kAhead = kPrefetchAhead, typename F, typename... Streams>
HOST_DEVICE void for_each_in_strip(int64_t first, bool ahead, F f, Streams... streams) {
  if (ahead) (prefetch(streams, first + kAhead), ...);
  for_each_of_strip<Streams...>(f, (streams.data + first)...);
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
#if defined(__clang__) && __clang_major__ == 14  // or it makes no vectors of a strip
#pragma clang loop unroll(disable)
#endif
  for (int first = 0; first < kBatchSize; first += kStripSize) {
    for_each_in_strip(first, ahead, f, batches.elements()...);
  }
}

template <int kAhead = kPrefetchAhead, typename F, typename... Streams>
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
    for_each_in_strip<kAhead>(i, i + kAhead < known, f, streams...);
  }
  for (; i < span.count; ++i) {
    asm volatile("");  // or the compiler would make vectors of so few
    call_with_element(i, f, streams...);
  }
}

}  // namespace adamprox
