// A tracked step on the CPU notes updates and params block by block, while they are in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "multi_tensor_apply_cpu.h"
#include "reduction_tree_cpu.h"
#include "telemetry.h"

namespace adamprox {

// How often bins were seen, in binary and in several lanes: bit b of the word at[k][i] is bit k of
// lane i's count of bin b. So one operation counts all bins of several lanes.
struct BitPlanes {
  static constexpr int kPlanes = 11, kLanes = 16, kOfBlock = 4;
  static_assert(kLanes << kOfBlock == kBlockSize && kChunkSize / kLanes < 1 << kPlanes);
  alignas(64) uint32_t at[kPlanes][kLanes] = {};
  // Of a block there is one carry out of the first planes. In these, every other one has to wait.
  uint32_t waiting[kPlanes][kLanes];
  uint32_t blocks = 0;

  bool waits(int plane) const { return plane >= kOfBlock && blocks >> (plane - kOfBlock) & 1; }
};

// Adds bits of each bin to a sum; returns the carries.
inline __attribute__((always_inline)) uint32_t add(uint32_t& sum, uint32_t a, uint32_t b) {
  const uint32_t differ = a ^ b, carry = (differ & sum) | (~differ & a);
  sum ^= differ;
  return carry;
}

// Adds 2^Planes words to as many planes; returns the carry.
template <int Planes, typename F>
inline __attribute__((always_inline)) uint32_t add_words(uint32_t* planes, F word, int first = 0) {
  if constexpr (Planes == 0) {
    return word(first);
  } else {
    const uint32_t a = add_words<Planes - 1>(planes, word, first);
    const uint32_t b = add_words<Planes - 1>(planes, word, first + (1 << (Planes - 1)));
    return add(planes[Planes - 1], a, b);
  }
}

// The bins of a block.
template <typename T>
MULTIVERSION void add(BitPlanes& planes, const T* values, const MagnitudeClasses<T>& classes) {
  constexpr int kLanes = BitPlanes::kLanes, kOfBlock = BitPlanes::kOfBlock;
  uint32_t carries[kLanes];
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) {
    uint32_t sums[kOfBlock];
    for (int k = 0; k < kOfBlock; ++k) sums[k] = planes.at[k][i];
    carries[i] = add_words<kOfBlock>(
        sums, [=](int k) { return uint32_t{1} << classes.bin(values[k * kLanes + i]); });
    for (int k = 0; k < kOfBlock; ++k) planes.at[k][i] = sums[k];
  }
  int plane = kOfBlock;
  for (; planes.waits(plane); ++plane) {
#pragma GCC ivdep
#pragma GCC unroll 1  // or it would be unrolled before it is vectorised
    for (int i = 0; i < kLanes; ++i) {
      carries[i] = add(planes.at[plane][i], planes.waiting[plane][i], carries[i]);
    }
  }
  std::copy(carries, carries + kLanes, planes.waiting[plane]);
  ++planes.blocks;
}

MULTIVERSION inline void count(const BitPlanes& planes, uint32_t* counts) {
  uint32_t all[32] = {};
  const auto add = [&](const uint32_t* words, int plane) __attribute__((always_inline)) {
    for (int i = 0; i < BitPlanes::kLanes; ++i) {
      for (int b = 0; b < 32; ++b) all[b] += (words[i] >> b & 1) << plane;
    }
  };
  for (int k = 0; k < BitPlanes::kPlanes; ++k) {
    add(planes.at[k], k);
    if (planes.waits(k)) add(planes.waiting[k], k);
  }
  std::copy(all, all + kBins, counts);
}

// A block of values, with zeros up to its size.
template <typename Storage>
struct FullBlock {
  Storage rest[kBlockSize];
  const Storage* values;

  inline __attribute__((always_inline)) FullBlock(const Storage* data, int64_t count)
      : values(count == kBlockSize ? data : rest) {
    if (count == kBlockSize) return;
    std::fill(std::copy(data, data + count, rest), rest + kBlockSize, Storage{});
  }
};

// The sum of number(first), number(first + Step), ..., below Count, by halves.
template <int Step, int Count, typename F>
inline __attribute__((always_inline)) auto add_halves(F number, int first = 0) {
  if constexpr (Step == Count) {
    return number(first);
  } else {
    const auto half = add_halves<2 * Step, Count>(number, first);
    return half + add_halves<2 * Step, Count>(number, first + Step);
  }
}

template <typename Storage>
inline __attribute__((always_inline)) Compute<Storage> sum_by_halves(const Storage* values) {
  using T = Compute<Storage>;
  constexpr int kLanes = 16, kSmall = 16 / sizeof(T);
  typedef T Small __attribute__((vector_size(kSmall * sizeof(T))));
  T sums[kLanes];
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) {
    sums[i] = add_halves<1, kBlockSize / kLanes>([=](int k) {
      const T value = Convert<Storage>::widen(values[k * kLanes + i]);
      return value * value;
    });
  }
  // Left alone, the compiler would shuffle every number to its place.
  const Small sum = add_halves<1, kLanes / kSmall>([&](int k) {
    Small small;
    std::memcpy(&small, sums + kSmall * k, sizeof(small));
    return small;
  });
  return add_halves<1, kSmall>([&](int i) { return sum[i]; });
}

struct UpdateNotes {
  BlockSums squares;
  BitPlanes magnitudes;
  uint32_t added = 0;  // zeros that filled blocks, in the first bin
  uint32_t nans = 0;   // in the last one

  void write(Record& record) const {
    record.update_squares = squares.total();
    count(magnitudes, record.counts);
    record.counts[0] -= added;
    record.counts[kBins - 1] -= nans;
  }
};

// Of a block.
template <typename T>
MULTIVERSION void note_updates(const T* updates, int64_t count, double alpha, UpdateNotes& notes) {
  const FullBlock<T> block(updates, count);
  const MagnitudeClasses<T> classes(alpha);
  add(notes.magnitudes, block.values, classes);
  notes.added += kBlockSize - count;
  const T sum = sum_by_halves(block.values);
  notes.squares.add(sum);
  if (sum == sum) return;
  for (int64_t i = 0; i < count; ++i) notes.nans += updates[i] != updates[i];
}

struct ParamNotes {
  BlockSums squares;
  uint32_t zeros = 0;

  template <typename Param>
  void write(const Param* params, int64_t count, Record& record) const {
    record.param_squares = squares.total();
    record.counts[kZeros] = zeros;
    record.counts[kNaNs] = record.counts[kInfinities] = 0;
    if (record.param_squares <= std::numeric_limits<double>::max()) return;  // then there are none
    for (int64_t i = 0; i < count; ++i) {
      const int c = special_class(Convert<Param>::widen(params[i]));
      if (c > kZeros) ++record.counts[c];
    }
  }
};

// Of a block.
template <typename Param>
MULTIVERSION void note_params(const Param* params, int64_t count, ParamNotes& notes) {
  const FullBlock<Param> block(params, count);
  uint32_t zeros = 0;
  for (int i = 0; i < kBlockSize; ++i) zeros += Convert<Param>::widen(block.values[i]) == 0;
  notes.zeros += zeros - static_cast<uint32_t>(kBlockSize - count);
  notes.squares.add(sum_by_halves(block.values));
}

}  // namespace adamprox
