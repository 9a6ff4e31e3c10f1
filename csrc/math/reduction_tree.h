// The one order in which squares are summed, in double, whatever the chunks, threads and ranks.
//
// Neighbours are added, then neighbours among these sums, until one is left; the last one of an odd
// number stays as it is. So whoever has values k * 2^n to (k + 1) * 2^n knows one of the sums.
// Squares are no negative zeros: zeros may stand where there are none.
// reference.py says the same in PyTorch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamprox {

template <typename T>
HOST_DEVICE double square(T value) {
  return static_cast<double>(value) * static_cast<double>(value);
}

// The sums that wait for their right neighbours, at most one a level: of 2^level terms each.
template <int kLevels = 48>
struct WaitingSums {
  double at_level[kLevels];

  // Term number `index`, in their order from 0 on.
  HOST_DEVICE void add(uint64_t index, double sum) {
    int level = 0;
    for (; (index >> level) & 1; ++level) sum = at_level[level] + sum;
    at_level[level] = sum;
  }

  // Of `kCount` terms, a power of two.
  template <int kCount>
  HOST_DEVICE double total_of() const {
    int level = 0;
    while ((kCount >> level) != 1) ++level;
    return at_level[level];
  }

  // Of `count` terms.
  HOST_DEVICE double total(uint64_t count) const {
    double sum = 0;
    for (int level = 0; (count >> level) != 0; ++level) {
      if ((count >> level) & 1) sum = at_level[level] + sum;
    }
    return sum;
  }
};

}  // namespace adamprox
