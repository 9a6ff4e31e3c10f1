// The CPU's loop over elements: widen, call a functor, narrow. It knows memory; not Adam.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "half_cpu.h"
#include "streams.h"
#include "tensor_table.h"

// Loops are compiled for each of these; which one runs is decided when the library loads.
#if defined(ADAMPROX_TARGET_CLONES)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

namespace adamprox {

struct Span {  // some elements of one row
  const TensorRow& row;
  void* grad;
  int64_t begin, count;
  int64_t after;  // how many the same thread is about to work on next

  template <typename T>
  T* at(void* data) const {
    return static_cast<T*>(data) + begin;
  }

  Span part(int64_t first, int64_t size) const {
    return {row, grad, begin + first, size, after + count - first - size};
  }

  Span alone() const { return {row, grad, begin, count, 0}; }
};

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

// A turn of a loop, and how far ahead of it memory is asked for. The hardware's own foresight ends
// with every page, and the processor's when it has too much else to do.
constexpr int kStripSize = 16, kPrefetchAhead = 256;

template <typename Stream>
HOST_DEVICE void prefetch(const Stream& stream, int64_t first) {
  const auto* strip = reinterpret_cast<const char*>(stream.data + first);
  const int bytes = kStripSize * sizeof(typename Stream::Element);
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(strip + at);
}

template <typename Storage>
HOST_DEVICE void prefetch(const Write<Storage>&, int64_t) {}

template <int kSize, typename F, typename... Streams>
HOST_DEVICE void for_each_of(int64_t first, F f, Streams... streams) {
#pragma GCC ivdep
  for (int64_t i = first; i < first + kSize; ++i) f(Slot<Streams>(streams, i).element()...);
}

template <typename F, typename... Streams>
HOST_DEVICE void for_each_of_strip(int64_t first, bool ahead, F f, Streams... streams) {
  if (ahead) (prefetch(streams, first + kPrefetchAhead), ...);
  for_each_of<kStripSize>(first, f, streams...);
}

// A few strips, for what is looked at again at once.
constexpr int kFewSize = 4 * kStripSize;

// Of a stream, as a loop sees them: float16 as float32 on the stack, loaded and stored as by a Slot.
template <typename Stream>
struct Few {
  Stream stream;
  HOST_DEVICE Few(Stream s, bool) : stream(s) {}
  HOST_DEVICE Stream seen() { return stream; }
};

template <template <typename> typename Stream>
struct OnStack : Stream<float> {};

template <template <typename> typename Stream>
HOST_DEVICE void prefetch(const OnStack<Stream>&, int64_t) {}

template <template <typename> typename Stream>
struct Few<Stream<Half>> {
  Stream<Half> stream;
  alignas(64) float values[kFewSize];

  HOST_DEVICE Few(Stream<Half> s, bool ahead) : stream(s) {
    constexpr int kHalvesOfALine = 32;
    for (int first = 0; ahead && first < kFewSize; first += kHalvesOfALine) {
      prefetch(stream, first + kPrefetchAhead);
    }
    widen(stream.data, kFewSize, values);
  }

  HOST_DEVICE ~Few() {
    if constexpr (Stream<Half>::kWritten) narrow(values, kFewSize, stream.data);
  }

  HOST_DEVICE OnStack<Stream> seen() { return {{values}}; }
};

template <typename F, typename... Streams>
HOST_DEVICE void for_each_of_strips(bool ahead, F f, Streams... streams) {
  // Addresses in registers: as a sum, in each instruction, they would take a second slot of the
  // processor's.
  const auto in_register = [](auto& data) __attribute__((always_inline)) { asm("" : "+r"(data)); };
  (in_register(streams.data), ...);
#pragma GCC unroll 4
  for (int first = 0; first < kFewSize; first += kStripSize) {
    for_each_of_strip(first, ahead, f, streams...);
  }
}

template <typename F, typename... Streams>
HOST_DEVICE void for_each_of_few(bool ahead, F f, Streams... streams) {
  const auto call = [&](auto&&... few) __attribute__((always_inline)) {
    for_each_of_strips(ahead, f, few.seen()...);
  };
  call(Few<Streams>(streams, ahead)...);
}

template <typename F, typename... Streams>
HOST_DEVICE void for_each_element(const Span& span, F f, Streams... streams) {
  const int64_t known = span.count + span.after;
  int64_t i = 0;
  if constexpr ((std::is_same_v<typename Streams::Element, Half> || ...)) {
    for (; i + kFewSize <= span.count; i += kFewSize) {
      for_each_of_few(i + kFewSize + kPrefetchAhead <= known, f, Streams{streams.data + i}...);
    }
  }
  for (; i + kStripSize <= span.count; i += kStripSize) {
    for_each_of_strip(i, i + kPrefetchAhead < known, f, streams...);
  }
  for (; i < span.count; ++i) {
    asm volatile("");  // or the compiler would make vectors of so few
    f(Slot<Streams>(streams, i).element()...);
  }
}

}  // namespace adamprox
