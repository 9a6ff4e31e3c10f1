// AdamProxL2's second sweep, in the same launch as the first one.
//
// A tensor of one chunk is shrunk at once. A chunk whose tensor has others waits for their sums of
// squares: its block puts it aside, and takes the next one. A block waits for others only when it has
// no chunk left to update, and the blocks that have one never wait. So there is always one that gets
// on, however few of the blocks the GPU runs at a time. What was put aside last is shrunk first, since
// it may still be in the L2 cache; and each element by the thread that has written it.
#pragma once

#include "../math/update.h"
#include "finish.cuh"

namespace adamprox {

// All threads of a block call it. It is not inlined: a kernel has it once.
__device__ __noinline__ void shrink_params(void* params, DType dtype, int count, bool aligned,
                                           double shrinkage) {
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
    const ReadWrite<Param> param{known_global<Param>(params)};
    for_each_element(Block{}, count, aligned,
                     PerElement{[&](int, Compute<Param>& p) { shrink(p); }}, param);
  });
}

// All threads of a block call its functions. In shared memory is what the loop over elements has no
// registers for: `sums`, `top`, and indices of chunks.
struct SecondSweep {
  const LaunchArgs& args;
  double* sums;
  int32_t& top;  // the chunk that was put aside last, or -1

  // The chunk is updated, and `sums` are those of its squares.
  __device__ __forceinline__ void add(const int32_t& index) {
    const ChunkSpan chunk(args, index);
    __syncthreads();
    const double sum = sum_of_block(sums[2 * threadIdx.x] + sums[2 * threadIdx.x + 1], sums);
    if (chunk.row.numel <= kChunkSize) return shrink(chunk, sum);
    if (threadIdx.x == 0) {
      args.work.sums[index] = sum;
      __threadfence();
      count(chunk.row);
    }
    const int32_t below = shrink_all(false);
    __syncthreads();  // all threads have read top
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
      const ChunkSpan chunk(args, index);
      if (chunk.row_index != current) {
        if (!updated(chunk.row, wait)) break;
        current = chunk.row_index;
        sum = sum_of_tensor(chunk.row);
      }
      shrink(chunk, sum);
      if (threadIdx.x == 0) count(chunk.row);
      index = args.work.progress[index].below;
    }
    return index;
  }

 private:
  __device__ __forceinline__ uint32_t* done(const TensorRow& row) {
    return &args.work.progress[row.first_chunk].done;
  }

  // Every chunk counts twice, updated and shrunk; the last one sets the count to zero.
  __device__ __forceinline__ void count(const TensorRow& row) {
    atomicInc(done(row), 2 * static_cast<uint32_t>(num_chunks_of(row.numel)) - 1);
  }

  // Whether all of a tensor's chunks are updated.
  __device__ __forceinline__ bool updated(const TensorRow& row, bool wait) {
    bool all = false;
    if (threadIdx.x == 0) {
      const volatile uint32_t* count = done(row);
      while (!(all = *count >= num_chunks_of(row.numel)) && wait) __nanosleep(100);
      __threadfence();
    }
    return __syncthreads_or(all);
  }

  __device__ __forceinline__ double sum_of_tensor(const TensorRow& row) {
    const int64_t count = num_chunks_of(row.numel);
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

  __device__ __forceinline__ void shrink(const ChunkSpan& chunk, double sum) {
    const TensorRow& row = chunk.row;
    shrink_params(chunk.at(row.param, row.param_dtype), row.param_dtype, chunk.count,
                  row.aligned != 0, ProxL2::shrinkage(sum, args.scalars_of(row).decay[0]));
    finish_chunk(Block{}, args, chunk);
  }
};

}  // namespace adamprox
