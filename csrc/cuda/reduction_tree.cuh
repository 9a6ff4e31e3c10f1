// The reduction tree on a GPU, over a number of each thread of a warp or a block.
#pragma once

#include "../math/reduction_tree.h"
#include "loop.cuh"

namespace adamprox {

constexpr int kSums = kChunkSize / kWarp;  // that a block has in shared memory
static_assert(kSums == 2 * kThreads);

// Every thread gets the sum.
__device__ __forceinline__ double sum_of_warp(double sum) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    sum = sum + __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return sum;
}

__device__ __forceinline__ double sum_of_block(double sum, double* shared) {
  const int lane = threadIdx.x % kWarp;
  sum = sum_of_warp(sum);
  __syncthreads();
  if (lane == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  return sum_of_warp(lane < kWarps ? shared[lane] : 0.0);
}

}  // namespace adamprox
