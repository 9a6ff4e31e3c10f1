// A tracked step on the CPU notes updates and params block by block, while they are in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "multi_tensor_apply_cpu.h"
#include "reduction_tree_cpu.h"
#include "telemetry.h"

namespace adamprox {

// How often bins were seen, in binary and in several lanes: bit b of the word at[k][i] is bit k of
// lane i's count of bin b. So one operation counts all bins of several lanes.
struct BitPlanes {
  static constexpr int kPlanes = 11, kLanes = 16, kWords = kBlockSize / kLanes;
  static_assert(kWords == 16 && kChunkSize / kLanes < 1 << kPlanes);
  uint32_t at[kPlanes][kLanes] = {};
};

// Adds three bits of each bin; returns the carries.
inline __attribute__((always_inline)) uint32_t add(uint32_t a, uint32_t b, uint32_t c,
                                                   uint32_t& sum) {
  const uint32_t differ = a ^ b;
  sum = differ ^ c;
  return (a & b) | (c & differ);
}

// The words of a block, each with the bit of its bin.
MULTIVERSION inline void add(BitPlanes& planes, const uint32_t* words) {
#pragma GCC ivdep
  for (int i = 0; i < BitPlanes::kLanes; ++i) {
    uint32_t sums[2][4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      uint32_t w[8];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) w[k] = words[(half * 8 + k) * BitPlanes::kLanes + i];
      uint32_t ones, twos;
      const uint32_t a = add(w[0], w[1], w[2], ones);
      const uint32_t b = add(ones, w[3], w[4], ones);
      const uint32_t c = add(ones, w[5], w[6], ones);
      const uint32_t d = add(ones, w[7], 0, sums[half][0]);
      const uint32_t e = add(a, b, c, twos);
      const uint32_t f = add(twos, d, 0, sums[half][1]);
      sums[half][3] = add(e, f, 0, sums[half][2]);
    }
    uint32_t sum, carry = 0, over = 0;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      carry = add(sums[0][k], sums[1][k], carry, sum);
      over = add(planes.at[k][i], sum, over, planes.at[k][i]);
    }
    over = add(planes.at[4][i], carry, over, planes.at[4][i]);
#pragma GCC unroll 6
    for (int k = 5; k < BitPlanes::kPlanes; ++k) {
      over = add(planes.at[k][i], over, 0, planes.at[k][i]);
    }
  }
}

MULTIVERSION inline void count(const BitPlanes& planes, uint32_t* counts) {
  uint32_t all[32] = {};
  for (int k = 0; k < BitPlanes::kPlanes; ++k) {
    for (const uint32_t word : planes.at[k]) {
      for (int b = 0; b < 32; ++b) all[b] += (word >> b & 1) << k;
    }
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

template <typename Storage>
inline __attribute__((always_inline)) Compute<Storage> sum_by_halves(const Storage* values) {
  using T = Compute<Storage>;
  constexpr int kPart = kBlockSize / 8;
  T sums[kPart];
#pragma GCC ivdep
  for (int i = 0; i < kPart; ++i) {
    T q[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const T value = Convert<Storage>::widen(values[k * kPart + i]);
      q[k] = value * value;
    }
    sums[i] = ((q[0] + q[4]) + (q[2] + q[6])) + ((q[1] + q[5]) + (q[3] + q[7]));
  }
#pragma GCC unroll 5
  for (int half = kPart / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
  }
  return sums[0];
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
  uint32_t words[kBlockSize];
  for (int i = 0; i < kBlockSize; ++i) words[i] = uint32_t{1} << classes.bin(block.values[i]);
  add(notes.magnitudes, words);
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
  uint32_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    zeros += Magnitude<Compute<Param>>::of(Convert<Param>::widen(params[i])) == 0;
  }
  notes.zeros += zeros;
  notes.squares.add(sum_by_halves(FullBlock<Param>(params, count).values));
}

}  // namespace adamprox
