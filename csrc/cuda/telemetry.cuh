// A tracked step on a GPU goes through a chunk in pieces. It notes a piece's updates once they are made,
// from the moments, which are still in a cache, and the new params in a sweep over the chunk that has
// just been written. So the loops over elements are those of any step.
#pragma once

#include "../math/adam.h"
#include "../math/dispatch.h"
#include "../math/telemetry.h"
#include "launch.cuh"
#include "reduction_tree.cuh"

namespace adamprox {

constexpr int kPiece = kTileSize;  // a block of it for each warp
static_assert(kPiece == kBlockSize * kWarps && kBlockSize == 8 * kWarp);

// In shared memory that only a tracked launch has.
struct ChunkNotes {
  double sums[kChunkSize / kBlockSize];  // of the squares of blocks
  uint32_t counts[kCounts];
};

#if defined(__CUDACC__)  // tests/cuda_on_host has its own
__device__ __forceinline__ ChunkNotes* chunk_notes() {
  extern __shared__ double shared_of_launch[];
  return reinterpret_cast<ChunkNotes*>(shared_of_launch);
}
#endif

// A warp at a time takes a block, whose compute type is T: see note().
template <typename T>
__device__ __forceinline__ void note_blocks(const void* values, const void* exp_avg_sq, DType dtype,
                                            int first, int count, const Scalars& scalars,
                                            ChunkNotes& notes) {
  const int lane = threadIdx.x % kWarp;
  const bool of_updates = exp_avg_sq != nullptr;
  const MagnitudeClasses<T> classes(scalars.alpha);
  const auto step_size = static_cast<T>(scalars.step_size), eps = static_cast<T>(scalars.eps);
  const auto load = [dtype](const void* from, int i) {
    T value = 0;
    with_dtype(dtype, [&](auto type) {
      using Storage = typename decltype(type)::type;
      if constexpr (std::is_same_v<Compute<Storage>, T>) {
        value = Convert<Storage>::widen(static_cast<const Storage*>(from)[i]);
      }
    });
    return value;
  };
#pragma unroll 1
  for (int begin = threadIdx.x / kWarp * kBlockSize; begin < count; begin += kWarps * kBlockSize) {
    T two = 0, four = 0, sum = 0;  // from zeros, which change no sum of squares
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const int eighth = (k & 1) * 4 + (k & 2) + (k & 4) / 4;  // so that halves follow each other
      const int i = begin + eighth * kWarp + lane;
      T value = 0;
      if (i < count) {
        value = load(values, i);
        if (of_updates)
          value = adam_update(value, adam_denominator(load(exp_avg_sq, i), eps), step_size);
        int c = special_class(value);
        if (of_updates) c = value == value ? static_cast<int>(classes.bin(value)) : -1;
        if (c >= 0) atomicAdd(&notes.counts[c], 1u);
      }
      two = two + value * value;
      if (k % 2 == 1) {
        four = four + two;
        two = 0;
      }
      if (k % 4 == 3) {
        sum = sum + four;
        four = 0;
      }
    }
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) {
      sum = sum + __shfl_xor_sync(0xffffffffu, sum, half);
    }
    if (lane == 0) notes.sums[(first + begin) / kBlockSize] = sum;
  }
}

// Notes `count` elements that are at `first` in their chunk: the updates, from both moments, or the
// params, if `exp_avg_sq` is null. `record` is null until they are the chunk's last ones. All
// threads of a block call it. It is not inlined: a kernel has it once, for all dtypes.
__device__ __noinline__ void note(const void* values, const void* exp_avg_sq, DType dtype,
                                  int first, int count, const Scalars* scalars, Record* record) {
  ChunkNotes& notes = *chunk_notes();
  const int thread = threadIdx.x;
  __syncthreads();
  if (first == 0) {
    if (thread < kChunkSize / kBlockSize) notes.sums[thread] = 0;
    if (thread < kCounts) notes.counts[thread] = 0;
    __syncthreads();
  }
  if (dtype == DType::kFloat64) {
    note_blocks<double>(values, exp_avg_sq, dtype, first, count, *scalars, notes);
  } else {
    note_blocks<float>(values, exp_avg_sq, dtype, first, count, *scalars, notes);
  }
  __syncthreads();
  if (record == nullptr) return;
  const double of_block = thread < kChunkSize / kBlockSize ? notes.sums[thread] : 0.0;
  const double sum = sum_of_block(of_block, notes.sums);
  const bool of_updates = exp_avg_sq != nullptr;
  const int begin = of_updates ? 0 : kBins, end = of_updates ? kBins : kCounts;
  if (thread >= begin && thread < end) record->counts[thread] = notes.counts[thread];
  if (thread == 0) {
    record->step = scalars->step;
    (of_updates ? record->update_squares : record->param_squares) = sum;
  }
}

// A tracked step's, of the updates of a piece of a chunk, the piece at `first`.
__device__ __forceinline__ void note_updates(const LaunchArgs& args, const ChunkSpan& piece,
                                             int first, bool last) {
  const TensorRow& row = piece.row;
  const bool amsgrad = row.states[kMaxExpAvgSq] != nullptr;
  note(piece.at(row.states[kExpAvg], row.state_dtype),
       piece.at(row.states[amsgrad ? kMaxExpAvgSq : kExpAvgSq], row.state_dtype), row.state_dtype,
       first, piece.count, &args.scalars_of(row), last ? &args.records[piece.chunk] : nullptr);
}

// And of the chunk's params, once they are final.
__device__ __forceinline__ void note_params(const LaunchArgs& args, const ChunkSpan& chunk) {
  const TensorRow& row = chunk.row;
  note(chunk.at(row.param, row.param_dtype), nullptr, row.param_dtype, 0, chunk.count,
       &args.scalars_of(row), &args.records[chunk.chunk]);
}

}  // namespace adamprox
