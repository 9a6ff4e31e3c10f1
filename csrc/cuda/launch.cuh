// The arguments of a launch, and how its blocks share its chunks out: each takes one when it is free.
#pragma once

#include <cstdint>
#include <type_traits>

#include "loop.cuh"

namespace adamprox {

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kParameters = 4096;  // the bytes that a kernel's parameters may take
#else
constexpr int kParameters = 32764;  // from CUDA 12.1 on
#endif
constexpr int kInlinePayload = (kParameters - 96) / 16 * 16;  // beside the other members

struct LaunchArgs {
  const TensorRow* rows;
  const Chunk* chunks;
  int64_t num_rows;
  // The launch's share of the chunks; a warp takes one of the last num_packed.
  int32_t first_chunk = 0, num_chunks = 0, num_packed = 0;
  Workspace work;
  Record* records;  // one a chunk, where a tracked step is noted; null: it is not
  // What the recipes have become, PreparedHead and Scalars[]; null: the payload has no recipes.
  PreparedHead* prepared;
  // DeviceTable::payload(). It rides along in the kernel's parameters, and so needs no copy of its own,
  // unless it is too long.
  const unsigned char* payload;  // null: inline_payload
  alignas(16) unsigned char inline_payload[kInlinePayload];

  // `num_chunks` of all of the step's launches.
  LaunchArgs(void* metadata, int64_t num_rows, int64_t num_chunks, int64_t num_slots,
             const void* payload, void* prepared, Record* records)
      : rows(static_cast<const TensorRow*>(metadata)),
        chunks(reinterpret_cast<const Chunk*>(rows + num_rows)),
        num_rows(num_rows),
        work(const_cast<Chunk*>(chunks + num_chunks), num_chunks + num_slots),
        records(records),
        prepared(static_cast<PreparedHead*>(prepared)),
        payload(static_cast<const unsigned char*>(payload)) {}

  // A ticket is for a chunk, or for a pack of them.
  HOST_DEVICE int32_t num_tickets() const {
    return num_chunks - num_packed + (num_packed + kWarps - 1) / kWarps;
  }

  __device__ __forceinline__ void* const* grads() const {
    return reinterpret_cast<void* const*>(payload != nullptr ? payload : inline_payload);
  }

  __device__ __forceinline__ const RecipesHead& recipes() const {
    return *reinterpret_cast<const RecipesHead*>(grads() + num_rows);
  }

  __device__ __forceinline__ const Scalars& scalars_of(const TensorRow& row) const {
    const auto* all = prepared != nullptr ? prepared->scalars()
                                          : reinterpret_cast<const Scalars*>(grads() + num_rows);
    return all[row.scalars];
  }

  __device__ __forceinline__ bool skip() const { return prepared != nullptr && prepared->skip; }
};
static_assert(sizeof(LaunchArgs) <= kParameters, "more than a kernel's parameters may be");

// A pointer of which the compiler then knows that it points to global memory.
template <typename T>
__device__ __forceinline__ T* known_global(void* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return static_cast<T*>(data);
}

// A range of a row's elements: a chunk, or a piece of one.
struct ChunkSpan {
  int32_t chunk;
  int32_t row_index;
  const TensorRow& row;
  int64_t begin;
  int count;

  __device__ __forceinline__ ChunkSpan(const LaunchArgs& args, int32_t chunk)
      : chunk(chunk),
        row_index(args.chunks[chunk].row),
        row(args.rows[row_index]),
        begin(args.chunks[chunk].begin),
        count(args.chunks[chunk].count) {}

  // Whether it begins at a multiple of 16 bytes in all of the row's tensors.
  __device__ __forceinline__ bool aligned() const {
    return row.aligned != 0 && begin * size_of(row.param_dtype) % 16 == 0;
  }

  // At most `most` of its elements, from the `first` on.
  __device__ __forceinline__ ChunkSpan piece(int first, int most) const {
    ChunkSpan piece = *this;
    piece.begin += first;
    piece.count = count - first < most ? count - first : most;
    return piece;
  }

  // Where it begins in the memory of a param, grad or state, whose type is known at run time, or at
  // compile time.
  __device__ __forceinline__ void* at(void* data, DType dtype) const {
    return static_cast<char*>(data) + begin * size_of(dtype);
  }
  template <typename T>
  __device__ __forceinline__ T* at(void* data) const {
    return known_global<T>(data) + begin;
  }
};

// Calls f(team, chunk) for chunk after chunk, with all threads of a block, or with a warp for each of
// a pack. Each block takes the next ones when it is free: a fixed share could be all the weights, and
// another one all the biases.
template <typename Team, typename F>
__device__ __forceinline__ void for_each_chunk(const LaunchArgs& args, F f) {
  __shared__ int32_t index, next;
  const int32_t count = args.num_tickets();
  // Every block takes one ticket too many, of which the last one sets the count to zero.
  const auto take = [&] { return atomicInc(args.work.ticket, count + gridDim.x - 1); };
  const bool takes = threadIdx.x == kThreads - 1;  // the thread with the least to do
  if (takes) next = take();
  while (true) {
    if (takes) index = args.first_chunk + next;
    __syncthreads();
    const int32_t ticket = index - args.first_chunk;
    if (ticket >= count) return;
    if (takes) next = take();  // on its way while the chunk is being worked on
    if constexpr (std::is_same_v<Team, Block>) {
      f(Block{}, index);
    } else {
      const int32_t pack = ticket - (args.num_chunks - args.num_packed);
      const int32_t chunk = pack < 0 ? index : index + (kWarps - 1) * pack + threadIdx.x / kWarp;
      if (chunk < args.first_chunk + args.num_chunks) f(Team{pack < 0}, chunk);
    }
    __syncthreads();
  }
}

}  // namespace adamprox
