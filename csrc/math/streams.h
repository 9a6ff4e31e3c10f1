// What a loop over elements runs along: memory of one storage type, read, written or both.
#pragma once

#include <cstdint>

#include "convert.h"

namespace adamprox {

template <typename Storage>
struct Read {
  const Storage* data;
  static constexpr bool kWritten = false;
  using Element = Storage;
  using T = Compute<Storage>;
  HOST_DEVICE T load(int64_t i) const { return Convert<Storage>::widen(data[i]); }
  HOST_DEVICE void store(int64_t, T) const {}
};

template <typename Storage>
struct Write {
  Storage* data;
  static constexpr bool kWritten = true;
  using Element = Storage;
  using T = Compute<Storage>;
  HOST_DEVICE T load(int64_t) const { return {}; }
  HOST_DEVICE void store(int64_t i, T value) const { data[i] = Convert<Storage>::narrow(value); }
};

template <typename Storage>
struct ReadWrite {
  Storage* data;
  static constexpr bool kWritten = true;
  using Element = Storage;
  using T = Compute<Storage>;
  HOST_DEVICE T load(int64_t i) const { return Convert<Storage>::widen(data[i]); }
  HOST_DEVICE void store(int64_t i, T value) const { data[i] = Convert<Storage>::narrow(value); }
};

}  // namespace adamprox
