// AdamProxL2's second sweep, in the same launch as the first one.
//
// A tensor of one chunk is shrunk at once. A chunk whose tensor has others waits for their sums of
// squares: its block puts it aside, and takes the next one. Only blocks that have no chunk left to
// update ever wait for others, and those that have one never wait: somebody always gets on, however
// few of the blocks the GPU runs at a time. What was put aside last is shrunk first, since it may
// still be in the L2 cache; and each element by the thread that has written it.
#pragma once

#include "dispatch.h"
#include "launch.cuh"
#include "reduction_tree.cuh"
#include "telemetry.cuh"
#include "update.h"

namespace adamprox {

// All threads of a block call it. Not inlined: a kernel has it once.
__device__ __noinline__ void shrink_params(void* params, DType dtype, int count, bool aligned,
                                           double shrinkage) {
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
    const ReadWrite<Param> param{known_global<Param>(params)};
    for_each_element(Block{}, count, aligned, EachAlone{[&](int, Compute<Param>& p) { shrink(p); }},
                     param);
  });
}

struct Pending {
  const LaunchArgs& args;
  double* sums;
  int32_t& top;  // in shared memory, as is all that the loop over elements has no register for

  // Of a chunk that is updated, with the sums of its squares.
  __device__ __forceinline__ void add(const int32_t& index) {
    const Work work(args, index);
    __syncthreads();
    const double sum = sum_of_block(sums[2 * threadIdx.x] + sums[2 * threadIdx.x + 1], sums);
    if (work.row.numel <= kChunkSize) return shrink(work, sum);
    if (threadIdx.x == 0) {
      args.work.sums[index] = sum;
      __threadfence();
      count(work.row);
    }
    const int32_t below = shrink_all(false);
    __syncthreads();  // everyone has read top
    if (threadIdx.x == 0) {
      args.work.progress[index].below = below;
      top = index;
    }
  }

  // As far as it gets without waiting, or to the end; returns the chunk that is on top now.
  __device__ __forceinline__ int32_t shrink_all(bool wait) {
    int32_t current = -1;
    double sum = 0;
    int32_t index = top;
    while (index >= 0) {
      const Work work(args, index);
      if (work.row_index != current) {
        if (!updated(work.row, wait)) break;
        current = work.row_index;
        sum = sum_of_tensor(work.row);
      }
      shrink(work, sum);
      if (threadIdx.x == 0) count(work.row);
      index = args.work.progress[index].below;
    }
    return index;
  }

 private:
  static __device__ __forceinline__ uint32_t num_chunks(const TensorRow& row) {
    return static_cast<uint32_t>((row.numel + kChunkSize - 1) / kChunkSize);
  }

  __device__ __forceinline__ uint32_t* done(const TensorRow& row) {
    return &args.work.progress[row.first_chunk].done;
  }

  // Every chunk counts twice, updated and shrunk; the last one sets the count to zero.
  __device__ __forceinline__ void count(const TensorRow& row) {
    atomicInc(done(row), 2 * num_chunks(row) - 1);
  }

  // Whether all of a tensor's chunks are updated.
  __device__ __forceinline__ bool updated(const TensorRow& row, bool wait) {
    bool all = false;
    if (threadIdx.x == 0) {
      const volatile uint32_t* count = done(row);
      while (!(all = *count >= num_chunks(row)) && wait) __nanosleep(100);
      __threadfence();
    }
    return __syncthreads_or(all);
  }

  __device__ __forceinline__ double sum_of_tensor(const TensorRow& row) {
    const int64_t count = num_chunks(row);
    const auto sum_of_chunk = [&](int64_t i) {
      return i < count ? __ldcg(&args.work.sums[row.first_chunk + i]) : 0.0;  // no old L1 line
    };
    auto& waiting = *reinterpret_cast<WaitingSums<>*>(sums + kWarp);
    double sum = 0;
    for (int64_t i = 0; i < count; i += kSums) {
      const int64_t pair = i + 2 * threadIdx.x;
      sum = sum_of_block(sum_of_chunk(pair) + sum_of_chunk(pair + 1), sums);
      if (threadIdx.x == 0 && count > kSums) waiting.add(i / kSums, sum);
      __syncthreads();
    }
    if (count <= kSums) return sum;
    if (threadIdx.x == 0) sums[0] = waiting.total((count + kSums - 1) / kSums);
    __syncthreads();
    return sums[0];
  }

  __device__ __forceinline__ void shrink(const Work& work, double sum) {
    const TensorRow& row = work.row;
    shrink_params(work.at(row.param, row.param_dtype), row.param_dtype, work.count,
                  row.aligned != 0, ProxL2::shrinkage(sum, work.scalars(args).decay));
    note_params(args, work);
  }
};

}  // namespace adamprox
