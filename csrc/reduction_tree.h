// The one order in which squares are summed, in double, whatever the chunking and the threads.
//
// sum(values): lane i takes values i, i + kTileSize, i + 2 * kTileSize, ... from left to right;
// then the upper half of the lanes is added to the lower half until one lane is left.
// A tensor's sum of squares is the sum of its chunks' sums. reference.py says the same in PyTorch.
#pragma once

#include "host_device.h"
#include "tensor_table.h"

namespace adamprox {

struct Add {
  HOST_DEVICE void operator()(double& value, double& lane) const { lane = lane + value; }
};

struct AddSquare {
  template <typename T>
  HOST_DEVICE void operator()(T& value, double& lane) const {
    lane = lane + static_cast<double>(value) * static_cast<double>(value);
  }
};

// Halves the first `active` lanes, the only ones in use, down to lane 0. `worker` is one of
// `workers` threads that share the lanes; all of them call it, and `barrier` holds them together.
template <typename Barrier>
HOST_DEVICE double sum_lanes(double* lanes, int64_t active, int worker, int workers,
                             Barrier barrier) {
  for (int64_t half = kTileSize / 2; half > 0; half /= 2) {
    const int64_t end = active - half < half ? active - half : half;
#if !defined(__CUDACC__)
#pragma GCC ivdep  // the halves do not overlap
#endif
    for (int64_t i = worker; i < end; i += workers) {
      lanes[i] = lanes[i] + lanes[i + half];
    }
    barrier();
  }
  return lanes[0];
}

}  // namespace adamprox
