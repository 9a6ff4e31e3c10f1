// The reduction tree on a CPU: four neighbours of four vectors at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../math/convert.h"
#include "../math/reduction_tree.h"
#include "../math/telemetry.h"
#include "loop.h"

namespace adamprox {

typedef double Quad __attribute__((vector_size(32)));

// The sums of four neighbours each.
inline __attribute__((always_inline)) void add_neighbours(const Quad& a, const Quad& b,
                                                          const Quad& c, const Quad& d,
                                                          double* sums) {
  typedef int64_t At __attribute__((vector_size(32)));
  const At even{0, 4, 2, 6}, odd{1, 5, 3, 7}, front{0, 1, 4, 5}, back{2, 3, 6, 7};
  const Quad ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  const Quad cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
  const Quad four = __builtin_shuffle(ab, cd, front) + __builtin_shuffle(ab, cd, back);
  std::memcpy(sums, &four, sizeof(four));
}

// Two levels of the reduction tree: from `count` values to a quarter of them, and zeros up to a
// multiple of four; returns how many.
template <bool kSquares, typename Storage>
inline __attribute__((always_inline)) int64_t add_fours(const Storage* values, int64_t count,
                                                        double* sums) {
  int64_t i = 0;
  const auto add = [&](const Storage* from) __attribute__((always_inline)) {
    Quad q[4];
    for (int j = 0; j < 16; ++j) {
      const auto value = Convert<Storage>::widen(from[j]);
      q[j / 4][j % 4] = kSquares ? square(value) : value;
    }
    add_neighbours(q[0], q[1], q[2], q[3], sums + i / 4);
    i += 16;
  };
  while (i + 16 <= count) add(values + i);
  if (i < count) {
    Storage rest[16] = {};
    std::copy(values + i, values + count, rest);
    add(rest);
  }
  return i / 4;
}

// What is left to do when add_fours has taken all of a block's values.
inline __attribute__((always_inline)) double sum_of_fours(double* sums, int64_t count) {
  while (count > 4) count = add_fours<false>(sums, count, sums);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The sum of squares of a chunk's blocks, one after another.
class BlockSums {
 public:
  void add(double sum) { sums_[count_++] = sum; }
  double total() {
    while (count_ == 0 || count_ % 4 != 0) add(0);
    return sum_of_fours(sums_, count_);
  }

 private:
  double sums_[kChunkSize / kBlockSize];
  int64_t count_ = 0;
};

}  // namespace adamprox
