// The CPU's loop over elements: widen, call a functor, narrow. It knows memory; not Adam.
#pragma once

#include <cstdint>

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

  template <typename T>
  T* at(void* data) const {
    return static_cast<T*>(data) + begin;
  }
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

template <typename F, typename... Streams>
HOST_DEVICE void for_each_element(int64_t count, F f, Streams... streams) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    f(Slot<Streams>(streams, i).element()...);
  }
}

}  // namespace adamprox
