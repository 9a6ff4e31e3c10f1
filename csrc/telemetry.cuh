// A tracked step on a GPU goes through a chunk in pieces, and notes the updates of each when they are
// made, from the moments that are still in a cache; the new params in a sweep over the chunk that has
// just been written. So the loops over elements are those of any step.
#pragma once

#include "adam.h"
#include "dispatch.h"
#include "launch.cuh"
#include "reduction_tree.cuh"
#include "telemetry.h"

namespace adamprox {

constexpr int kPiece = kTileSize;

// In shared memory that only a tracked launch has.
struct ChunkNotes {
  double sums[kSums];  // of squares, of kWarp neighbours each
  uint32_t counts[kCounts];
};

#if defined(__CUDACC__)  // tests/cuda_on_host has its own
__device__ __forceinline__ ChunkNotes* chunk_notes() {
  extern __shared__ double shared_of_launch[];
  return reinterpret_cast<ChunkNotes*>(shared_of_launch);
}
#endif

// Of `count` elements that are at `first` in their chunk: of the updates, from both moments, or of
// the params, if `exp_avg_sq` is null. `record` is null until they are the chunk's last ones. All
// threads of a block call it. Not inlined, and with values widened to double, which changes neither
// their order nor their squares: a kernel has it once.
__device__ __noinline__ void note(const void* values, const void* exp_avg_sq, DType dtype,
                                  int first, int count, const Scalars* scalars, Record* record) {
  ChunkNotes& notes = *chunk_notes();
  const int thread = threadIdx.x;
  const bool of_updates = exp_avg_sq != nullptr;
  __syncthreads();
  if (first == 0) {
    for (int i = thread; i < kSums; i += kThreads) notes.sums[i] = 0;
    if (thread < kCounts) notes.counts[thread] = 0;
    __syncthreads();
  }
  const double alpha = scalars->alpha;
  const MagnitudeClasses<double> classes(dtype == DType::kFloat64 ? alpha
                                                                  : static_cast<float>(alpha));
#pragma unroll 1
  for (int i = thread; i - thread % kWarp < count; i += kThreads) {
    double value = 0;
    if (i < count) {
      with_dtype(dtype, [&](auto type) {
        using Storage = typename decltype(type)::type;
        using T = Compute<Storage>;
        const auto load = [i](const void* from) {
          return Convert<Storage>::widen(static_cast<const Storage*>(from)[i]);
        };
        value = of_updates ? adam_update<T>(load(values), load(exp_avg_sq),
                                            static_cast<T>(scalars->step_size),
                                            static_cast<T>(scalars->eps))
                           : load(values);
      });
      const int c = !of_updates ? special_class(value) : value == value ? classes.bin(value) : -1;
      if (c >= 0) atomicAdd(&notes.counts[c], 1u);
    }
    const double sum = sum_of_warp(square(value));
    if (thread % kWarp == 0) notes.sums[(first + i) / kWarp] = sum;
  }
  __syncthreads();
  if (record == nullptr) return;
  const double sum = sum_of_block(notes.sums[2 * thread] + notes.sums[2 * thread + 1], notes.sums);
  const int begin = of_updates ? 0 : kBins, end = of_updates ? kBins : kCounts;
  if (thread >= begin && thread < end) record->counts[thread] = notes.counts[thread];
  if (thread == 0) {
    record->step = scalars->step;
    (of_updates ? record->update_squares : record->param_squares) = sum;
  }
}

// Of the updates of a piece, if the step is tracked.
__device__ __forceinline__ void note_updates(const LaunchArgs& args, const Work& work, int first,
                                             bool last) {
  if (args.records == nullptr) return;
  const TensorRow& row = work.row;
  void* exp_avg_sq = row.max_exp_avg_sq != nullptr ? row.max_exp_avg_sq : row.exp_avg_sq;
  note(work.at(row.exp_avg, row.state_dtype), work.at(exp_avg_sq, row.state_dtype), row.state_dtype,
       first, work.count, &work.scalars(args), last ? &args.records[work.chunk()] : nullptr);
}

// Of a chunk's params, once they are final, if the step is tracked.
__device__ __forceinline__ void note_params(const LaunchArgs& args, const Work& work) {
  if (args.records == nullptr) return;
  const TensorRow& row = work.row;
  note(work.at(row.param, row.param_dtype), nullptr, row.param_dtype, 0, work.count,
       &work.scalars(args), &args.records[work.chunk()]);
}

}  // namespace adamprox
