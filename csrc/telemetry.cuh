// A tracked step on a GPU keeps the updates of a piece of a chunk in shared memory, and notes them
// before the next piece; the new params in a sweep over the chunk that has just been written.
//
// What notes is not inlined, so that a kernel has it once, and not in each of its loops.
#pragma once

#include "dispatch.h"
#include "launch.cuh"
#include "reduction_tree.cuh"
#include "telemetry.h"

namespace adamprox {

// In shared memory that only a tracked launch has.
struct ChunkNotes {
  static constexpr int kMostPieces = 16;
  uint4 updates[kTileSize / 4];  // of a piece, in the compute type
  double sums[kSums + 1];        // as AndSquares has them
  double squares[kMostPieces];   // of the pieces' updates
  uint32_t counts[kCounts];
};

template <typename T>
constexpr int kPiece = sizeof(ChunkNotes::updates) / sizeof(T);
static_assert(kChunkSize / kPiece<double> == ChunkNotes::kMostPieces);

#if defined(__CUDACC__)  // tests/cuda_on_host has its own
__device__ __forceinline__ ChunkNotes* chunk_notes() {
  extern __shared__ uint4 shared_of_launch[];
  return reinterpret_cast<ChunkNotes*>(shared_of_launch);
}
#endif

template <typename T>
__device__ __forceinline__ T* kept_updates() {
  return reinterpret_cast<T*>(chunk_notes()->updates);
}

// All threads of a block call what follows.

// Of the `count` updates kept of a piece; with the chunk's last piece, of which `record` is not null,
// the chunk's notes are complete.
template <typename T>
__device__ __noinline__ void note_updates(int piece, int count, double alpha, double step,
                                          Record* record) {
  constexpr int kEach = kPiece<T> / kThreads, kWords = sizeof(ChunkNotes::updates) / kThreads / 16;
  struct Words {
    uint4 at[kWords];
  } words;
  struct Elements {
    T at[kEach];
  };
  ChunkNotes& notes = *chunk_notes();
  const int thread = threadIdx.x;
  if (piece == 0) {
    if (thread < kCounts) notes.counts[thread] = 0;
    if (thread < ChunkNotes::kMostPieces) notes.squares[thread] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWords; ++i) words.at[i] = notes.updates[thread * kWords + i];
  const auto mine = bit_cast<Elements>(words);
  const MagnitudeClasses<T> classes(alpha);
  WaitingSums<4> waiting;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const T update = thread * kEach + i < count ? mine.at[i] : T(0);
    waiting.add(i, square(update));
    if (thread * kEach + i < count && update == update) {
      atomicAdd(&notes.counts[classes.bin(update)], 1u);
    }
  }
  const double sum = sum_of_block(waiting.template total_of<kEach>(), notes.sums);
  if (thread == 0) notes.squares[piece] = sum;
  if (record == nullptr) return;
  __syncthreads();
  const int lane = thread % kWarp;
  const double total = sum_of_warp(lane < ChunkNotes::kMostPieces ? notes.squares[lane] : 0.0);
  if (thread < kBins) record->counts[thread] = notes.counts[thread];
  if (thread == 0) {
    record->step = step;
    record->update_squares = total;
  }
}

template <typename Param>
__device__ __noinline__ void note_params(const Param* params, int count, bool aligned,
                                         Record* record) {
  ChunkNotes& notes = *chunk_notes();
  const int thread = threadIdx.x;
  __syncthreads();
  for (int i = thread; i <= kSums; i += kThreads) notes.sums[i] = 0;
  if (thread < kCounts) notes.counts[thread] = 0;
  __syncthreads();
  const auto count_special = [&](int, int, Compute<Param> param) {
    const int c = special_class(param);
    if (c >= 0) atomicAdd(&notes.counts[c], 1u);
  };
  const AndSquares<Param, decltype(count_special)> note{
      count_special, notes.sums, notes.sums + kSums, {}};
  for_each_element<1>(count, aligned, note, Read<Param>{params});
  __syncthreads();
  const double sum = sum_of_block(notes.sums[2 * thread] + notes.sums[2 * thread + 1], notes.sums);
  if (thread >= kBins && thread < kCounts) record->counts[thread] = notes.counts[thread];
  if (thread == 0) record->param_squares = sum;
}

// Of a chunk's params, once they are final, by the threads that have written them; if the step is
// tracked.
__device__ __forceinline__ void note_params(const LaunchArgs& args, const Work& work) {
  if (args.records == nullptr) return;
  with_dtype(work.row.param_dtype, [&](auto dtype) {
    using Param = typename decltype(dtype)::type;
    note_params<Param>(work.at<Param>(work.row.param), work.count, work.row.aligned != 0,
                       &args.records[work.chunk()]);
  });
}

}  // namespace adamprox
