// The CUDA kernel: one launch updates every chunk of every tensor, whatever its group and dtype.
//
// Blocks take the chunks in order, each as soon as it is free. AdamProxL2 shrinks a tensor by its
// norm: one of a single chunk at once; else each block shrinks what it has updated itself, in the
// same launch, once the other blocks are done with theirs (see Pending).
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "multi_tensor_apply.cuh"
#include "reduction_tree.h"
#include "update.h"

namespace adamprox {

constexpr int kBlocksPerMultiprocessor = 2;  // the budget: 128 registers a thread, no spills

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kParameters = 4096;  // the bytes that a kernel's parameters may take
#else
constexpr int kParameters = 32764;  // from CUDA 12.1 on
#endif
constexpr int kInlinePayload = (kParameters - 64) / 16 * 16;  // beside 8 words

struct LaunchArgs {
  const TensorRow* rows;
  const Chunk* chunks;
  int64_t num_rows;
  int64_t num_chunks;
  Workspace work;
  // What changes at each step: void*[num_rows], the grads, then Scalars[]. It rides along in the
  // kernel's parameters, and so needs no copy of its own, unless it is too long.
  const unsigned char* payload;  // null: inline_payload
  alignas(16) unsigned char inline_payload[kInlinePayload];

  LaunchArgs(void* metadata, int64_t num_rows, int64_t num_chunks, const void* payload)
      : rows(static_cast<const TensorRow*>(metadata)),
        chunks(reinterpret_cast<const Chunk*>(rows + num_rows)),
        num_rows(num_rows),
        num_chunks(num_chunks),
        work(const_cast<Chunk*>(chunks + num_chunks), num_chunks),
        payload(static_cast<const unsigned char*>(payload)) {}
};
static_assert(sizeof(LaunchArgs) <= kParameters, "more than a kernel's parameters may be");

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

  __device__ __forceinline__ void* grad() const {
    return reinterpret_cast<void* const*>(payload)[row_index];
  }

  __device__ __forceinline__ const Scalars& scalars(const LaunchArgs& args) const {
    const auto* all = reinterpret_cast<const Scalars*>(payload + args.num_rows * sizeof(void*));
    return all[row.scalars];
  }

  // Its elements of a tensor, known to the compiler to be in global memory.
  template <typename T>
  __device__ __forceinline__ T* at(void* data) const {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(data));
#endif
    return static_cast<T*>(data) + begin;
  }
};

// The lanes that a block sums in shared memory.
__device__ __forceinline__ double sum_of_block(double* lanes, int64_t active) {
  __syncthreads();
  return sum_lanes(lanes, active, threadIdx.x, kThreads, [] { __syncthreads(); });
}

template <typename Rule, typename Param, typename State>
__device__ __forceinline__ void update_chunk(const Work& work, const Scalars& scalars,
                                             double* lanes) {
  using T = Compute<Param>;
  const TensorRow& row = work.row;
  const Update<Rule, T> update(scalars);
  const ReadWrite<Param> param{work.at<Param>(row.param)};
  const Once<Read<Param>> grad{{work.at<Param>(work.grad())}};
  const Once<ReadWrite<State>> exp_avg{{work.at<State>(row.exp_avg)}};
  const Once<ReadWrite<State>> exp_avg_sq{{work.at<State>(row.exp_avg_sq)}};
  const auto step = [&](int i, T& p, auto&... others) {
    update(p, others...);
    if constexpr (std::is_same_v<Rule, ProxL2>) {  // of z as it is stored
      T stored = Convert<Param>::widen(Convert<Param>::narrow(p));
      AddSquare{}(stored, lanes[i % kTileSize]);
    }
  };
  constexpr int kMostVectors = std::is_same_v<Rule, ProxL2> ? 2 : 4;
  const auto run = [&](auto... streams) {
    for_each_element<kMostVectors>(work.count, row.aligned != 0, step, streams...);
  };
  if (row.max_exp_avg_sq == nullptr) {
    run(param, grad, exp_avg, exp_avg_sq);
  } else {
    const Once<ReadWrite<State>> max_exp_avg_sq{{work.at<State>(row.max_exp_avg_sq)}};
    run(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  }
}

// AdamProxL2's second sweep. A chunk whose tensor has others waits for their sums of squares: its
// block puts it aside, and takes the next one. Only blocks that have no chunk left to update ever
// wait for others, and those never wait before: somebody always gets on, however few of the blocks
// the GPU runs at a time. The last chunk put aside is the first one shrunk, since it may still be in
// the L2 cache; and each element by the thread that has written it.
struct Pending {
  const LaunchArgs& args;
  double* lanes;
  int32_t& top;  // in shared memory, as is all that the loop over elements has no register for

  // Of a chunk that is updated, with its squares in the lanes.
  __device__ __forceinline__ void add(const int32_t& index) {
    const Work work(args, index);
    const double sum = sum_of_block(lanes, work.count);
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
    for (int lane = threadIdx.x; lane < kTileSize; lane += kThreads) {
      lanes[lane] = 0;
      for (int64_t i = lane; i < count; i += kTileSize) {
        double term = __ldcg(&args.work.sums[row.first_chunk + i]);  // not from an old L1 line
        Add{}(term, lanes[lane]);
      }
    }
    return sum_of_block(lanes, count);
  }

  __device__ __forceinline__ void shrink(const Work& work, double sum) {
    const double shrinkage = ProxL2::shrinkage(sum, work.scalars(args).decay);
    with_dtype(work.row.param_dtype, [&](auto dtype) {
      using Param = typename decltype(dtype)::type;
      const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
      const ReadWrite<Param> param{work.at<Param>(work.row.param)};
      for_each_element<4>(
          work.count, work.row.aligned != 0, [&](int, Compute<Param>& p) { shrink(p); }, param);
    });
  }
};

// Calls f(index) for chunk after chunk, with all threads of a block. Each block takes the next one
// when it is free: a fixed share could be all the weights, and another one all the biases.
template <typename F>
__device__ __forceinline__ void for_each_chunk(const LaunchArgs& args, F f) {
  __shared__ int32_t index, next;
  const auto count = static_cast<uint32_t>(args.num_chunks);
  // Every block takes one ticket too many, of which the last one sets the count to zero.
  const auto take = [&] { return atomicInc(args.work.ticket, count + gridDim.x - 1); };
  const bool takes = threadIdx.x == kThreads - 1;  // the thread with the least to do
  if (takes) next = take();
  while (true) {
    if (takes) index = next;
    __syncthreads();
    if (index >= count) return;
    if (takes) next = take();  // on its way while the chunk is being worked on
    f(index);
    __syncthreads();
  }
}

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ LaunchArgs args) {
  constexpr bool kNorms = std::is_same_v<Rule, ProxL2>;
  __shared__ double lanes[kNorms ? kTileSize : 1];
  __shared__ int32_t top;
  Pending pending{args, lanes, top};
  if (threadIdx.x == 0) top = -1;
  for_each_chunk(args, [&](const int32_t& index) {
    const Work work(args, index);
    if constexpr (kNorms) {
      for (int lane = threadIdx.x; lane < kTileSize; lane += kThreads) lanes[lane] = 0;
      __syncthreads();
    }
    with_dtypes(work.row.param_dtype, work.row.state_dtype, [&](auto param, auto state) {
      update_chunk<Rule, typename decltype(param)::type, typename decltype(state)::type>(
          work, work.scalars(args), lanes);
    });
    if constexpr (kNorms) pending.add(index);
  });
  if constexpr (kNorms) pending.shrink_all(true);
}

}  // namespace adamprox
