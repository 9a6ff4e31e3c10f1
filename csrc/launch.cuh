// What a launch is given, and how its blocks share it out: chunk by chunk, each as soon as it is free.
#pragma once

#include <cstdint>
#include <type_traits>

#include "multi_tensor_apply.cuh"
#include "tensor_table.h"

namespace adamprox {

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kParameters = 4096;  // the bytes that a kernel's parameters may take
#else
constexpr int kParameters = 32764;  // from CUDA 12.1 on
#endif
constexpr int kInlinePayload = (kParameters - 112) / 16 * 16;  // beside 11 words, and a Decay

struct LaunchArgs {
  const TensorRow* rows;
  const Chunk* chunks;
  int64_t num_rows;
  int64_t num_chunks;
  int64_t num_packed;  // of the chunks, the last ones: a warp takes one
  Workspace work;
  Record* records;  // one a chunk, where a tracked step is noted; null: it is not
  // What the recipes have become, PreparedHead and Scalars[]; null: the payload has no recipes.
  unsigned char* prepared;
  // What changes at each step: void*[num_rows], the grads, then Scalars[], or RecipesHead and
  // Recipe[]. It rides along in the kernel's parameters, and so needs no copy of its own, unless it
  // is too long.
  const unsigned char* payload;  // null: inline_payload
  alignas(16) unsigned char inline_payload[kInlinePayload];

  LaunchArgs(Decay decay, void* metadata, int64_t num_rows, int64_t num_chunks, int64_t num_packed,
             const void* payload, void* prepared, Record* records)
      : rows(static_cast<const TensorRow*>(metadata)),
        chunks(reinterpret_cast<const Chunk*>(rows + num_rows)),
        num_rows(num_rows),
        num_chunks(num_chunks),
        // Norms and notes are a block's work.
        num_packed(decay == Decay::kProxL2 || records != nullptr ? 0 : num_packed),
        work(const_cast<Chunk*>(chunks + num_chunks), num_chunks),
        records(records),
        prepared(static_cast<unsigned char*>(prepared)),
        payload(static_cast<const unsigned char*>(payload)) {}

  // A ticket is a chunk's, or a pack's.
  HOST_DEVICE uint32_t num_tickets() const {
    return static_cast<uint32_t>(num_chunks - num_packed + (num_packed + kWarps - 1) / kWarps);
  }

  // Behind the grads.
  __device__ __forceinline__ const unsigned char* recipes_or_scalars() const {
    return (payload != nullptr ? payload : inline_payload) + num_rows * sizeof(void*);
  }

  __device__ __forceinline__ const PreparedHead* prepared_head() const {
    return reinterpret_cast<const PreparedHead*>(prepared);
  }

  __device__ __forceinline__ bool skip() const {
    return prepared != nullptr && prepared_head()->skip != 0;
  }
};
static_assert(sizeof(LaunchArgs) + sizeof(Decay) <= kParameters,
              "more than a kernel's parameters may be");

// A pointer of which the compiler then knows that it points to global memory.
template <typename T>
__device__ __forceinline__ T* known_global(void* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return static_cast<T*>(data);
}

// One chunk of the table.
struct Work {
  int32_t row_index;
  const TensorRow& row;
  int64_t begin;
  int count;
  const unsigned char* payload;

  __device__ __forceinline__ Work(const LaunchArgs& args, int32_t index)
      : row_index(args.chunks[index].row),
        row(args.rows[row_index]),
        begin(args.chunks[index].index * kChunkSize),
        count(row.numel - begin < kChunkSize ? row.numel - begin : kChunkSize),
        payload(args.payload != nullptr ? args.payload : args.inline_payload) {}

  // At most `most` elements of a chunk, from the `first` on.
  __device__ __forceinline__ Work(const Work& chunk, int first, int most)
      : row_index(chunk.row_index),
        row(chunk.row),
        begin(chunk.begin + first),
        count(chunk.count - first < most ? chunk.count - first : most),
        payload(chunk.payload) {}

  __device__ __forceinline__ void* grad() const {
    return reinterpret_cast<void* const*>(payload)[row_index];
  }

  __device__ __forceinline__ const Scalars& scalars(const LaunchArgs& args) const {
    const void* all = args.prepared != nullptr ? static_cast<const void*>(args.prepared_head() + 1)
                                               : args.recipes_or_scalars();
    return static_cast<const Scalars*>(all)[row.scalars];
  }

  __device__ __forceinline__ int64_t chunk() const { return row.first_chunk + begin / kChunkSize; }

  // Its elements of a tensor: of a type known at run time, or when it is compiled.
  __device__ __forceinline__ void* at(void* data, DType dtype) const {
    const int shift = dtype == DType::kFloat64 ? 3 : dtype == DType::kFloat32 ? 2 : 1;
    return static_cast<char*>(data) + (begin << shift);
  }
  template <typename T>
  __device__ __forceinline__ T* at(void* data) const {
    return known_global<T>(data) + begin;
  }
};

// Calls f(team, index) for chunk after chunk, with all threads of a block, or with a warp for each of
// a pack. Each block takes the next ones when it is free: a fixed share could be all the weights, and
// another one all the biases.
template <typename Team, typename F>
__device__ __forceinline__ void for_each_chunk(const LaunchArgs& args, F f) {
  __shared__ int32_t index, next;
  const uint32_t count = args.num_tickets();
  // Every block takes one ticket too many, of which the last one sets the count to zero.
  const auto take = [&] { return atomicInc(args.work.ticket, count + gridDim.x - 1); };
  const bool takes = threadIdx.x == kThreads - 1;  // the thread with the least to do
  if (takes) next = take();
  while (true) {
    if (takes) index = next;
    __syncthreads();
    if (index >= count) return;
    if (takes) next = take();  // on its way while the chunk is being worked on
    if constexpr (std::is_same_v<Team, Block>) {
      f(Block{}, index);
    } else {
      const int32_t pack = index - static_cast<int32_t>(args.num_chunks - args.num_packed);
      const int32_t chunk = pack < 0 ? index : index + (kWarps - 1) * pack + threadIdx.x / kWarp;
      if (chunk < args.num_chunks) f(Team{pack < 0}, chunk);
    }
    __syncthreads();
  }
}

}  // namespace adamprox
