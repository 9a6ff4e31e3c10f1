// AdamProxL2's second sweep, in the same launch as the first one.
//
// A chunk of whole blocks is shrunk at once, from what has just been written. A chunk that is a part of a
// larger block waits for the sums of squares of the others. Its threads put it aside, and take the next
// one. They wait for others only when they have no chunk left to update, and those that have one never
// wait. So there is always someone who gets on, however few blocks of threads the GPU runs at a time. What
// was put aside last is shrunk first, since it may still be in the L2 cache.
//
// A unit is a tensor, or a block of one. Who updates a unit's last chunk adds up the sums of its chunks.
// Tensors that are one block together have a slot each for their sums.
#pragma once

#include "../math/update.h"
#include "finish.cuh"

namespace adamprox {

constexpr int kRowOfWarp = kWarp * kWarp;  // a block up to this size is a warp's work

// All threads of a team call it. It is not inlined: a kernel has it once.
__device__ __noinline__ void shrink_params(Team team, void* params, DType dtype, int count,
                                           bool aligned, double shrinkage) {
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
    const ReadWrite<Param> param{known_global<Param>(params)};
    for_each_element(team, count, aligned, PerElement{[&](int, Compute<Param>& p) { shrink(p); }},
                     param);
  });
}

// A warp sums f(0) to f(count - 1), at most kRowOfWarp terms. Every lane gets the sum.
template <typename F>
__device__ __forceinline__ double sum_by_warp(int count, F f) {
  const int lane = threadIdx.x % kWarp;
  double mine = 0;  // of the segment that has the lane's number
  for (int first = 0; first < count; first += kWarp) {
    const double sum = sum_of_warp(first + lane < count ? f(first + lane) : 0.0);
    if (first / kWarp == lane) mine = sum;
  }
  return sum_of_warp(mine);
}

// A warp sums the squares of at most kRowOfWarp params, with several loads on their way.
__device__ __noinline__ double sum_of_params(const void* params, DType dtype, int count) {
  double sum = 0;
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    constexpr int kLoads = 8;
    const Param* from = known_global<Param>(const_cast<void*>(params));
    const int lane = threadIdx.x % kWarp;
    double mine = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kLoads * kWarp) {
      Param loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = first + i * kWarp + lane;
        loaded[i] = load_written(from + (at < count ? at : 0));
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool there = first + i * kWarp + lane < count;
        const double of_segment =
            sum_of_warp(there ? square(Convert<Param>::widen(loaded[i])) : 0.0);
        if (first / kWarp + i == lane) mine = of_segment;
      }
    }
    sum = sum_of_warp(mine);
  });
  return sum;
}

// A block of threads shrinks blocks of up to kWarp params, several of them with a warp: a lane has one
// param, and the lanes of a block are a power of two.
__device__ __noinline__ void shrink_tiny(void* params, DType dtype, int count, int block,
                                         const double* k) {
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    using T = Compute<Param>;
    Param* z = known_global<Param>(params);
    int lanes = 1;
    while (lanes < block) lanes *= 2;
    const int of_block = threadIdx.x % lanes, blocks = (count + block - 1) / block;
#pragma unroll 1
    for (int first = 0; first < blocks; first += kThreads / lanes) {
      const int begin = (first + static_cast<int>(threadIdx.x) / lanes) * block;
      const int numel = count - begin < block ? count - begin : block;
      const bool there = of_block < numel;
      T value = 0;
      if (there) value = Convert<Param>::widen(load_written(z + begin + of_block));
      double sum = square(value);
      for (int distance = 1; distance < lanes; distance *= 2) {
        sum = sum + __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (there) {
        const double shrinkage = ProxL2::shrinkage(sum, k, numel);
        z[begin + of_block] =
            Convert<Param>::narrow(ProxL2::shrink(value, static_cast<T>(shrinkage)));
      }
    }
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
    const int32_t parts = args.chunks[index].parts;
    if (parts == 0) {
      shrink_blocks(chunk);
      __syncthreads();
      return finish_chunk(Block{}, args, chunk);
    }
    const double sum = sum_of_block(sums[2 * threadIdx.x] + sums[2 * threadIdx.x + 1], sums);
    if (parts == 1 && chunk.row.num_slots == 0) return shrink(chunk, sum, chunk.count);
    const Unit unit(args, index);
    if (threadIdx.x == 0) args.work.sums[index] = sum;
    if (count(unit)) {
      const double total = sum_of_places(unit.first, unit.parts);
      if (threadIdx.x == 0) {
        args.work.sums[unit.place] = total;
        __threadfence();
        count_unit(unit);
      }
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
      const Unit unit(args, index);
      if (unit.norm != current) {
        if (!is_ready(unit, wait)) break;
        current = unit.norm;
        sum = sum_of_places(unit.norm, unit.units);
      }
      const ChunkSpan chunk(args, index);
      shrink(chunk, sum, numel_of_block(chunk.row, args.chunks[index], index));
      if (count(unit) && threadIdx.x == 0) count_unit(unit);
      index = args.work.progress[index].below;
    }
    return index;
  }

 private:
  // What a chunk is a part of: a tensor, or a block of one, and how many of those are a block together.
  struct Unit {
    int32_t first, parts;  // its chunks
    int32_t place;         // of its sum
    int32_t norm, units;   // the first place of the block's units, where they are counted; how many

    __device__ __forceinline__ Unit(const LaunchArgs& args, int32_t index) {
      const Chunk& chunk = args.chunks[index];
      const TensorRow& row = args.rows[chunk.row];
      if (row.num_slots == 0) {
        first = place = norm = chunk.first;
        parts = chunk.parts;
        units = 1;
      } else {
        const int32_t slots = args.first_chunk + args.num_chunks;  // behind all chunks
        first = row.first_chunk;
        parts = static_cast<int32_t>(num_chunks_of(row.numel));
        place = slots + row.slot;
        norm = slots + row.first_slot;
        units = row.num_slots;
      }
    }
  };

  // Counts a chunk of a unit, which all threads have written; whether it is the last one. Every chunk
  // counts twice, updated and shrunk; each time the last one sets the count to zero.
  __device__ __forceinline__ bool count(const Unit& unit) {
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();
      const auto parts = static_cast<uint32_t>(unit.parts);
      last = atomicInc(&args.work.progress[unit.first].done, parts - 1) == parts - 1;
      __threadfence();
    }
    return __syncthreads_or(last);
  }

  // Every unit counts twice, too; the last one sets the count to zero.
  __device__ __forceinline__ void count_unit(const Unit& unit) {
    atomicInc(&args.work.progress[unit.norm].ready, 2 * static_cast<uint32_t>(unit.units) - 1);
  }

  // Whether all units of a block are summed.
  __device__ __forceinline__ bool is_ready(const Unit& unit, bool wait) {
    bool all = false;
    if (threadIdx.x == 0) {
      const volatile uint32_t* ready = &args.work.progress[unit.norm].ready;
      while (!(all = *ready >= static_cast<uint32_t>(unit.units)) && wait) __nanosleep(100);
      __threadfence();
    }
    return __syncthreads_or(all);
  }

  __device__ __forceinline__ double sum_of_places(int32_t first, int32_t count) {
    const auto sum_at = [&](int64_t i) {
      return i < count ? __ldcg(&args.work.sums[first + i]) : 0.0;  // no old L1 line
    };
    if (count == 1) return sum_at(0);
    auto& waiting = *reinterpret_cast<WaitingSums<>*>(sums + kWarp);
    double sum = 0;
    for (int64_t i = 0; i < count; i += kSums) {
      const int64_t pair = i + 2 * threadIdx.x;
      sum = sum_of_block(sum_at(pair) + sum_at(pair + 1), sums);
      if (threadIdx.x == 0 && count > kSums) waiting.add(i / kSums, sum);
      __syncthreads();
    }
    if (count <= kSums) return sum;
    if (threadIdx.x == 0) sums[0] = waiting.total((count + kSums - 1) / kSums);
    __syncthreads();
    return sums[0];
  }

  // A chunk of several blocks: tiny ones by a few lanes each, larger ones by warps, or by all threads.
  __device__ __forceinline__ void shrink_blocks(const ChunkSpan& chunk) {
    const TensorRow& row = chunk.row;
    const DType dtype = row.param_dtype;
    const double* k = args.scalars_of(row).decay;
    const int block = static_cast<int>(row.block);
    if (block <= kWarp) {
      shrink_tiny(chunk.at(row.param, dtype), dtype, chunk.count, block, k);
      return;
    }
    // Each warp's vectors are of one block, so that `sums` has the sums of its parts.
    const bool summed = block % (kWarp * sizeof(uint4) / 2) == 0;
    const Team team{block > kRowOfWarp};
    const int step = team.is_block ? block : kWarps * block;
    for (int first = team.is_block ? 0 : threadIdx.x / kWarp * block; first < chunk.count;
         first += step) {
      const ChunkSpan one = chunk.piece(first, block);
      void* params = one.at(row.param, dtype);
      double sum;
      if (summed) {
        const double* own = sums + first / kWarp;
        sum = sum_by_warp((one.count + kWarp - 1) / kWarp, [&](int i) { return own[i]; });
      } else if (!team.is_block) {
        sum = sum_of_params(params, dtype, one.count);
      } else {
        __syncthreads();
        for (int at = threadIdx.x / kWarp * kRowOfWarp; at < one.count; at += kWarps * kRowOfWarp) {
          const ChunkSpan part = one.piece(at, kRowOfWarp);
          const double of_part = sum_of_params(part.at(row.param, dtype), dtype, part.count);
          if (threadIdx.x % kWarp == 0) sums[at / kRowOfWarp] = of_part;
        }
        __syncthreads();
        sum =
            sum_by_warp((one.count + kRowOfWarp - 1) / kRowOfWarp, [&](int i) { return sums[i]; });
      }
      shrink_params(team, params, dtype, one.count, one.aligned(),
                    ProxL2::shrinkage(sum, k, one.count));
    }
  }

  __device__ __forceinline__ void shrink(const ChunkSpan& chunk, double sum, int64_t numel) {
    const TensorRow& row = chunk.row;
    shrink_params(Team{true}, chunk.at(row.param, row.param_dtype), row.param_dtype, chunk.count,
                  chunk.aligned(), ProxL2::shrinkage(sum, args.scalars_of(row).decay, numel));
    finish_chunk(Block{}, args, chunk);
  }
};

}  // namespace adamprox
