// The reduction tree on a GPU, over what the threads of a warp or a block have.
#pragma once

#include "multi_tensor_apply.cuh"
#include "reduction_tree.h"
#include "tensor_table.h"

namespace adamprox {

constexpr int kSums = kChunkSize / kWarp;  // that a block has in shared memory
static_assert(kSums == 2 * kThreads);

// The reduction tree over what neighbouring threads have, for each of them.
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
