// The CUDA kernels: one launch updates every chunk of every tensor, whatever its group and dtype;
// AdamProxL2 adds a second one that shrinks the tensors by their norms.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "multi_tensor_apply.cuh"
#include "reduction_tree.h"
#include "update.h"

namespace adamprox {

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kInlinePayload = 4096 - 64;  // kernel parameters take 4 KB
#else
constexpr int kInlinePayload = 32764 - 64;  // and 32,764 bytes from CUDA 12.1 on
#endif

struct LaunchArgs {
  const TensorRow* rows;
  const Chunk* chunks;
  int64_t num_rows;
  int64_t num_chunks;
  double* chunk_sums;  // AdamProxL2: one a chunk
  // What changes at each step: void*[num_rows], the grads, then Scalars[]. It rides along in the
  // kernel's parameters, and so needs no copy of its own, unless it is too long.
  const unsigned char* payload;  // null: inline_payload
  alignas(16) unsigned char inline_payload[kInlinePayload];
};
static_assert(sizeof(LaunchArgs) <= kInlinePayload + 64, "more than a kernel's parameters may be");

template <typename T>
struct Span {  // a chunk of one tensor
  const TensorRow& row;
  int64_t begin, end;

  template <typename F>
  __device__ __forceinline__ void for_each_tile(F f) const {
    for (int64_t tile = begin; tile < end; tile += kTileSize) {
      const bool full = tile + kTileSize <= end;
      f(TileRange{tile, full ? tile + kTileSize : end, full && row.aligned != 0});
    }
  }
};

// The lanes that a block sums in shared memory.
__device__ __forceinline__ double sum_of_block(double* lanes, int64_t active) {
  __syncthreads();
  return sum_lanes(lanes, active, threadIdx.x, kThreads, [] { __syncthreads(); });
}

// A pointer that came from memory, known to the compiler to be one to global memory.
template <typename T>
__device__ __forceinline__ T* global(void* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return static_cast<T*>(pointer);
}

template <typename Rule, typename Param, typename State>
__device__ __forceinline__ void update_chunk(const Span<Param>& span, void* grad_data,
                                             const Scalars& scalars, double* lanes,
                                             double* chunk_sum) {
  using T = Compute<Param>;
  constexpr int kWidth = 16 / sizeof(Param);
  const TensorRow& row = span.row;
  const Update<Rule, T> update(scalars);
  const ReadWrite<Param> param{global<Param>(row.param)};
  const Read<Param> grad{global<Param>(grad_data)};
  const ReadWrite<State> exp_avg{global<State>(row.exp_avg)};
  const ReadWrite<State> exp_avg_sq{global<State>(row.exp_avg_sq)};
  // Without amsgrad the largest second moment so far is -inf: the maths is compiled once for both.
  const Optional<State> max_exp_avg_sq{{global<State>(row.max_exp_avg_sq)}, T(-INFINITY)};
  if constexpr (std::is_same_v<Rule, ProxL2>) {  // each thread has its own lanes in shared memory
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) lanes[place_in_tile<kWidth>(i)] = 0;
  }

  const auto step = [&](int i, T& p, auto&... others) {
    update(p, others...);
    if constexpr (std::is_same_v<Rule, ProxL2>) {  // of z as it is stored
      T stored = Convert<Param>::widen(Convert<Param>::narrow(p));
      AddSquare{}(stored, lanes[place_in_tile<kWidth>(i)]);
    }
  };
  span.for_each_tile([&](const TileRange& range) {
    for_each_in_tile<kWidth>(range, step, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  });
  if constexpr (std::is_same_v<Rule, ProxL2>) {
    const double sum = sum_of_block(lanes, span.end - span.begin);
    if (threadIdx.x == 0) *chunk_sum = sum;
    __syncthreads();  // the lanes are free for the next chunk
  }
}

template <typename F>
__device__ __forceinline__ void for_each_chunk(const LaunchArgs& args, F f) {
  for (int64_t i = blockIdx.x; i < args.num_chunks; i += gridDim.x) {
    const Chunk chunk = args.chunks[i];
    const TensorRow& row = args.rows[chunk.row];
    const int64_t begin = chunk.index * kChunkSize;
    const int64_t end = begin + kChunkSize < row.numel ? begin + kChunkSize : row.numel;
    f(i, chunk.row, row, begin, end);
  }
}

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ LaunchArgs args) {
  __shared__ double lanes[std::is_same_v<Rule, ProxL2> ? kTileSize : 1];
  const unsigned char* payload = args.payload != nullptr ? args.payload : args.inline_payload;
  const auto* grads = reinterpret_cast<void* const*>(payload);
  const auto* scalars = reinterpret_cast<const Scalars*>(grads + args.num_rows);
  for_each_chunk(args, [&](int64_t i, int index, const TensorRow& row, int64_t begin, int64_t end) {
    with_dtypes(row.param_dtype, row.state_dtype, [&](auto param, auto state) {
      using Param = typename decltype(param)::type;
      using State = typename decltype(state)::type;
      update_chunk<Rule, Param, State>(Span<Param>{row, begin, end}, grads[index],
                                       scalars[row.scalars], lanes, args.chunk_sums + i);
    });
  });
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    shrink_kernel(const __grid_constant__ LaunchArgs args) {
  __shared__ double lanes[kTileSize];
  const unsigned char* payload = args.payload != nullptr ? args.payload : args.inline_payload;
  const auto* scalars = reinterpret_cast<const Scalars*>(payload + args.num_rows * sizeof(void*));
  int current = -1;
  double shrinkage = 0;
  for_each_chunk(args, [&](int64_t, int index, const TensorRow& row, int64_t begin, int64_t end) {
    if (index != current) {  // every block sums the chunks' sums itself: they are few
      current = index;
      const int64_t count = (row.numel + kChunkSize - 1) / kChunkSize;
      __syncthreads();
      for (int lane = threadIdx.x; lane < kTileSize; lane += kThreads) {
        lanes[lane] = 0;
        for (int64_t i = lane; i < count; i += kTileSize) {
          Add{}(args.chunk_sums[row.first_chunk + i], lanes[lane]);
        }
      }
      shrinkage = ProxL2::shrinkage(sum_of_block(lanes, count), scalars[row.scalars].decay);
    }
    with_dtype(row.param_dtype, [&](auto dtype) {
      using Param = typename decltype(dtype)::type;
      const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
      const ReadWrite<Param> param{global<Param>(row.param)};
      Span<Param>{row, begin, end}.for_each_tile([&](const TileRange& range) {
        for_each_in_tile<16 / sizeof(Param)>(
            range, [&](int, Compute<Param>& p) { shrink(p); }, param);
      });
    });
  });
}

}  // namespace adamprox
