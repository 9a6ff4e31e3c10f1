// What a loop over elements runs along: memory of one storage type, read, written or both.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.h"

namespace adamprox {

template <typename Storage, bool kIsRead, bool kIsWritten>
struct Memory {
  std::conditional_t<kIsWritten, Storage, const Storage>* data;
  static constexpr bool kWritten = kIsWritten;
  static constexpr bool kPrefetched = kIsRead;             // see cpu/loop.h
  static constexpr bool kOnce = false, kOptional = false;  // see cuda/loop.cuh
  using Element = Storage;
  using T = Compute<Storage>;

  HOST_DEVICE T load(int64_t i) const {
    if constexpr (kIsRead) return Convert<Storage>::widen(data[i]);
    return {};
  }
  HOST_DEVICE void store(int64_t i, T value) const {
    if constexpr (kIsWritten) data[i] = Convert<Storage>::narrow(value);
  }
};

template <typename Storage>
using Read = Memory<Storage, true, false>;
template <typename Storage>
using Write = Memory<Storage, false, true>;
template <typename Storage>
using ReadWrite = Memory<Storage, true, true>;

}  // namespace adamprox
