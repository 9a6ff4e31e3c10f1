// A tracked step on the CPU: what is noted of an element lies in the first cache until its block is
// complete.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "multi_tensor_apply_cpu.h"
#include "reduction_tree_cpu.h"
#include "telemetry.h"

namespace adamprox {

// Of each element of a block: where it counts, bit c for Record::counts[c], and two squares.
template <typename T>
struct BlockNotes {
  alignas(64) uint32_t classes[kBlockSize];
  alignas(64) T update_squares[kBlockSize];
  alignas(64) T param_squares[kBlockSize];
};

template <typename T>
class Note {
 public:
  explicit Note(double alpha) : magnitudes_(alpha) {}

  HOST_DEVICE void operator()(uint32_t& classes, T& update_square, T& param_square, T update,
                              T param) const {
    classes |= uint32_t{1} << magnitudes_.bin(update);
    update_square = update * update;
    note_param(classes, param_square, param);
  }

  static HOST_DEVICE void note_param(uint32_t& classes, T& square, T param) {
    classes |= param == 0 ? uint32_t{1} << kZeros : 0;
    square = param * param;
  }

 private:
  MagnitudeClasses<T> magnitudes_;
};

// How often classes were seen, in binary and in several lanes: bit c of the word at[k][i] is bit k of
// lane i's count of class c. So one operation counts all classes of several lanes. Of each block there
// is a carry.
struct BitPlanes {
  static constexpr int kLanes = 16, kOfBlock = 4, kOfBlocks = 6;
  static_assert(kLanes << kOfBlock == kBlockSize && kBlockSize << kOfBlocks == kChunkSize);
  alignas(64) uint32_t at[kOfBlock][kLanes] = {};
  alignas(64) uint32_t carries[1 << kOfBlocks][kLanes] = {};
  int blocks = 0;
};

// Adds bits of each class to a sum; returns the carries.
inline __attribute__((always_inline)) uint32_t add(uint32_t& sum, uint32_t a, uint32_t b) {
  const uint32_t differ = a ^ b, carry = (differ & sum) | (~differ & a);
  sum ^= differ;
  return carry;
}

// Adds 2^Planes words to as many planes; returns the carry.
template <int Planes, typename F>
HOST_DEVICE uint32_t add_words(uint32_t* planes, F word, int first = 0) {
  if constexpr (Planes == 0) {
    return word(first);
  } else {
    const uint32_t a = add_words<Planes - 1>(planes, word, first);
    const uint32_t b = add_words<Planes - 1>(planes, word, first + (1 << (Planes - 1)));
    return add(planes[Planes - 1], a, b);
  }
}

// The same in every lane: word(k, i).
template <int Planes, typename F>
HOST_DEVICE void add_words(uint32_t (*planes)[BitPlanes::kLanes], F word, uint32_t* carries) {
#pragma GCC ivdep
  for (int i = 0; i < BitPlanes::kLanes; ++i) {
    uint32_t sums[Planes];
    for (int k = 0; k < Planes; ++k) sums[k] = planes[k][i];
    carries[i] = add_words<Planes>(sums, [=](int k) { return word(k, i); });
    for (int k = 0; k < Planes; ++k) planes[k][i] = sums[k];
  }
}

// The classes of a block.
HOST_DEVICE void add(BitPlanes& planes, const uint32_t* classes) {
  constexpr int kLanes = BitPlanes::kLanes;
  add_words<BitPlanes::kOfBlock>(
      planes.at, [=](int k, int i) { return classes[k * kLanes + i]; },
      planes.carries[planes.blocks++]);
}

MULTIVERSION inline void count(const BitPlanes& planes, uint32_t* counts) {
  constexpr int kLanes = BitPlanes::kLanes, kOfBlock = BitPlanes::kOfBlock;
  uint32_t above[BitPlanes::kOfBlocks + 1][kLanes] = {};
  add_words<BitPlanes::kOfBlocks>(
      above, [&](int k, int i) { return planes.carries[k][i]; }, above[BitPlanes::kOfBlocks]);
  uint32_t all[kCounts] = {};
  const auto add = [&](const uint32_t* words, int plane) __attribute__((always_inline)) {
    for (int i = 0; i < kLanes; ++i) {
      for (int c = 0; c < kCounts; ++c) all[c] += (words[i] >> c & 1) << plane;
    }
  };
  for (int k = 0; k < kOfBlock; ++k) add(planes.at[k], k);
  for (int k = 0; k <= BitPlanes::kOfBlocks; ++k) add(above[k], kOfBlock + k);
  std::copy(all, all + kCounts, counts);
}

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

template <typename T>
inline __attribute__((always_inline)) T sum_by_halves(const T* values) {
  constexpr int kLanes = 16, kSmall = 16 / sizeof(T);
  typedef T Small __attribute__((vector_size(kSmall * sizeof(T))));
  T sums[kLanes];
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) {
    sums[i] = add_halves<1, kBlockSize / kLanes>([=](int k) { return values[k * kLanes + i]; });
  }
  // Left alone, the compiler would shuffle every number to its place.
  const Small sum = add_halves<1, kLanes / kSmall>([&](int k) {
    Small small;
    std::memcpy(&small, sums + kSmall * k, sizeof(small));
    return small;
  });
  return add_halves<1, kSmall>([&](int i) { return sum[i]; });
}

struct ChunkNotes {
  BlockSums update_squares, param_squares;
  BitPlanes planes;

  void write(Record& record) {
    record.update_squares = update_squares.total();
    record.param_squares = param_squares.total();
    count(planes, record.counts);
  }
};

// Of a chunk's params, NaNs and infinities: if there are any, their squares tell.
template <typename Param>
void count_special(const Param* params, int64_t size, Record& record) {
  if (record.param_squares <= std::numeric_limits<double>::max()) return;
  for (int64_t i = 0; i < size; ++i) {
    const int c = special_class(Convert<Param>::widen(params[i]));
    if (c > kZeros) ++record.counts[c];
  }
}

template <typename T>
HOST_DEVICE void add_block(BlockNotes<T>& block, int64_t size, ChunkNotes& notes) {
  for (int64_t i = size; i < kBlockSize; ++i) {
    block.classes[i] = 0;
    block.update_squares[i] = block.param_squares[i] = 0;
  }
  const T sum = sum_by_halves(block.update_squares);
  if (sum != sum) {  // no bin counts a NaN
    for (int i = 0; i < kBlockSize; ++i) {
      const T square = block.update_squares[i];
      if (square != square) block.classes[i] &= uint32_t{1} << kZeros;
    }
  }
  add(notes.planes, block.classes);
  notes.update_squares.add(sum);
  notes.param_squares.add(sum_by_halves(block.param_squares));
}

// As a call, where it is not worth compiling it once more.
template <typename T>
MULTIVERSION void call_add_block(BlockNotes<T>& block, int64_t size, ChunkNotes& notes) {
  add_block(block, size, notes);
}

}  // namespace adamprox
