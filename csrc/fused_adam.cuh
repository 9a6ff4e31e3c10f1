// The CUDA kernel: one launch updates every chunk of every tensor, whatever its group and dtype.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "launch.cuh"
#include "multi_tensor_apply.cuh"
#include "pending.cuh"
#include "recipes.h"
#include "reduction_tree.cuh"
#include "telemetry.cuh"
#include "update.h"

namespace adamprox {

constexpr int kBlocksPerMultiprocessor = 2;  // the budget: 128 registers a thread, no spills

// Also sums the squares of what is stored: a vector's by its thread, those of a warp's vectors, which
// are neighbours, by the warp, into the first of their places in `sums`. There is one for each kWarp
// elements, and the others stay zero, which changes no sum of squares.
template <typename Param, typename Update>
struct AndSquares {
  static constexpr bool kTogether = true;
  const Update update;
  double* sums;
  double* rest;            // of what is left, until it is summed
  WaitingSums<4> waiting;  // in registers: every index is known to the compiler

  template <typename T, typename... Others>
  __device__ __forceinline__ void operator()(int i, T& param, Others&... others) {
    update(param, others...);
    waiting.add(i, square(Convert<Param>::widen(Convert<Param>::narrow(param))));
  }

  // Of the warp's vectors, which begin at element `first`, the thread's is at `at`, or past the end,
  // where there may be a rest.
  template <int kWidth>
  __device__ __forceinline__ void finish(int first, int at, int end) {
    double sum = 0;
    if (at < end) {
      sum = waiting.template total_of<kWidth>();
    } else if (kWidth > 1 && at == end) {
      sum = *rest;
    }
    sum = sum_of_warp(sum);
    if (at == first) sums[first / kWarp] = sum;
  }

  // The rest of a chunk, which fills no vector, has been summed, before the vectors. If element
  // `first`, where it begins, is amid a warp's vectors, it is a part of that warp's sum: `finish` adds it.
  template <int kWidth>
  __device__ __forceinline__ void finish_rest(int first) {
    if (threadIdx.x == 0 && first % (kWarp * kWidth) != 0) {
      *rest = sums[first / kWarp];
      sums[first / kWarp] = 0;
    }
    __syncthreads();
  }
};

template <typename Rule, typename Param, typename State, typename Team>
__device__ __forceinline__ void update_chunk(Team team, const Work& work, const Scalars& scalars,
                                             double* sums, double* rest) {
  using T = Compute<Param>;
  const TensorRow& row = work.row;
  const Update<Rule, T> update(scalars);
  const ReadWrite<Param> param{work.at<Param>(row.param)};
  const Once<Read<Param>> grad{{work.at<Param>(work.grad())}};
  const Once<ReadWrite<State>> exp_avg{{work.at<State>(row.exp_avg)}};
  const Once<ReadWrite<State>> exp_avg_sq{{work.at<State>(row.exp_avg_sq)}};
  // One loop with and without amsgrad: a second one would be half as much code again. Without, the
  // stream is never touched, but lies in global memory like any other.
  const bool amsgrad = row.max_exp_avg_sq != nullptr;
  const Optional<Once<ReadWrite<State>>> max_exp_avg_sq{
      {{work.at<State>(amsgrad ? row.max_exp_avg_sq : row.exp_avg_sq)}}, amsgrad};
  const auto run = [&](const auto& step) {
    for_each_element(team, work.count, row.aligned != 0, step, param, grad, exp_avg, exp_avg_sq,
                     max_exp_avg_sq);
  };
  if constexpr (std::is_same_v<Rule, ProxL2>) {
    run(AndSquares<Param, Update<Rule, T>>{update, sums, rest, {}});
  } else {
    run(EachAlone{[&](int, auto&... elements) { update(elements...); }});
  }
}

// One block, before the update, where the payload has recipes.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ LaunchArgs args, const Decay decay) {
  const auto* head = reinterpret_cast<const RecipesHead*>(args.recipes_or_scalars());
  auto* prepared = reinterpret_cast<PreparedHead*>(args.prepared);
  prepare(decay, *head, *prepared, threadIdx.x, kThreads, [] { __syncthreads(); });
}

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ LaunchArgs args) {
  constexpr bool kNorms = std::is_same_v<Rule, ProxL2>;
  __shared__ double sums[kNorms ? kSums + 1 : 1];
  __shared__ int32_t top;
  if (args.skip()) return;
  Pending pending{args, sums, top};
  if (threadIdx.x == 0) top = -1;
  using Teams = std::conditional_t<kNorms, Block, Team>;
  for_each_chunk<Teams>(args, [&](auto team, const int32_t& index) {
    const Work chunk(args, index);
    if constexpr (kNorms) {
      for (int i = threadIdx.x; i <= kSums; i += kThreads) sums[i] = 0;
      __syncthreads();
    }
    const int piece = args.records != nullptr ? kPiece : static_cast<int>(kChunkSize);
    for (int first = 0; first < chunk.count; first += piece) {
      const Work work(chunk, first, piece);
      with_dtypes(work.row.param_dtype, work.row.state_dtype, [&](auto param, auto state) {
        update_chunk<Rule, typename decltype(param)::type, typename decltype(state)::type>(
            team, work, work.scalars(args), sums + first / kWarp, sums + kSums);
      });
      note_updates(args, work, first, first + work.count == chunk.count);
    }
    if constexpr (kNorms) {
      pending.add(index);
    } else {
      note_params(args, chunk);
    }
  });
  if constexpr (kNorms) pending.shrink_all(true);
}

}  // namespace adamprox
