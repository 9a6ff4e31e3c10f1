// The CUDA kernel: one launch updates every chunk of every tensor, whatever its group and dtype.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "launch.cuh"
#include "multi_tensor_apply.cuh"
#include "pending.cuh"
#include "recipes.h"
#include "reduction_tree.h"
#include "update.h"

namespace adamprox {

constexpr int kBlocksPerMultiprocessor = 2;  // the budget: 128 registers a thread, no spills

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

// One block, before the update, where the payload has recipes.
__global__ inline void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ LaunchArgs args, const Decay decay) {
  const auto* head = reinterpret_cast<const RecipesHead*>(args.recipes_or_scalars());
  auto* prepared = reinterpret_cast<PreparedHead*>(args.prepared);
  prepare(decay, *head, *prepared, threadIdx.x, kThreads, [] { __syncthreads(); });
}

template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ LaunchArgs args) {
  constexpr bool kNorms = std::is_same_v<Rule, ProxL2>;
  __shared__ double lanes[kNorms ? kTileSize : 1];
  __shared__ int32_t top;
  if (args.skip()) return;
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
