// The CPU's loop over elements: widen, call a functor, narrow. It knows memory; not Adam.
#pragma once

#include <cstdint>

#include "streams.h"

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

template <typename F, typename... Streams>
HOST_DEVICE void for_each_element(int64_t count, F f, Streams... streams) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    f(Slot<Streams>(streams, i).element()...);
  }
}

}  // namespace adamprox
