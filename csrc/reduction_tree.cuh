// The reduction tree on a GPU: threads sum their vectors, warps and blocks what neighbours have.
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
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  sum = sum_of_warp(sum);
  __syncthreads();
  if (lane == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  return sum_of_warp(lane < kWarps ? shared[lane] : 0.0);
}

// Also sums the squares of what is stored: a vector's by its thread, those of a warp's vectors, which
// are neighbours, by the warp; into `sums`, those of kWarp neighbours each, from zeros.
template <typename Param, typename Update>
struct AndSquares {
  static constexpr bool kTogether = true;
  const Update update;
  double* sums;
  double* rest;            // of what is left, until it is summed
  WaitingSums<4> waiting;  // in registers: every index is known to the compiler

  template <typename T, typename... Others>
  __device__ __forceinline__ void operator()(int first, int i, T& param, Others&... others) {
    update(first, i, param, others...);
    waiting.add(i, square(Convert<Param>::widen(Convert<Param>::narrow(param))));
  }

  // Of the warp's vectors, which begin at element `first`, the thread's is at `at`, or past the end,
  // where there may be a rest.
  template <int kWidth>
  __device__ __forceinline__ void finish(int first, int at, int end) {
    double sum = 0;
    if (at < end) {
      sum = waiting.template total_of<kWidth>();
    } else if (kWidth > 1 && at == end) {
      sum = *rest;
    }
    sum = sum_of_warp(sum);
    if (at == first) sums[first / kWarp] = sum;
  }

  // What is left of a chunk when all vectors of kWidth are full has been summed, before them; unless
  // their warps begin there, it belongs to the last of them.
  template <int kWidth>
  __device__ __forceinline__ void finish_rest(int first) {
    if (threadIdx.x == 0 && first % (kWarp * kWidth) != 0) {
      *rest = sums[first / kWarp];
      sums[first / kWarp] = 0;
    }
    __syncthreads();
  }
};

}  // namespace adamprox
