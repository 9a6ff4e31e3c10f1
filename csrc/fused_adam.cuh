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

template <typename Rule, typename Param, typename State>
__device__ __forceinline__ void update_chunk(const LaunchArgs& args, const Work& work,
                                             double* sums) {
  using T = Compute<Param>;
  const TensorRow& row = work.row;
  const Scalars& scalars = work.scalars(args);
  const Update<Rule, T> update(scalars);
  const bool tracked = args.records != nullptr;
  const int piece = tracked ? kPiece<T> : static_cast<int>(kChunkSize);
  for (int begin = 0; begin < work.count; begin += piece) {
    const int count = work.count - begin < piece ? work.count - begin : piece;
    const ReadWrite<Param> param{work.at<Param>(row.param) + begin};
    const Once<Read<Param>> grad{{work.at<Param>(work.grad()) + begin}};
    const Once<ReadWrite<State>> exp_avg{{work.at<State>(row.exp_avg) + begin}};
    const Once<ReadWrite<State>> exp_avg_sq{{work.at<State>(row.exp_avg_sq) + begin}};
    const auto step = [&](int first, int i, auto&... elements) {
      const T step = update(elements...);
      if (tracked) kept_updates<T>()[first + i] = step;
    };
    const auto run = [&](auto... streams) {
      if constexpr (std::is_same_v<Rule, ProxL2>) {
        const AndSquares<Param, decltype(step)> and_squares{
            step, sums + begin / kWarp, sums + kSums, {}};
        for_each_element<2>(count, row.aligned != 0, and_squares, streams...);
      } else {
        for_each_element<4>(count, row.aligned != 0, EachAlone{step}, streams...);
      }
    };
    if (row.max_exp_avg_sq == nullptr) {
      run(param, grad, exp_avg, exp_avg_sq);
    } else {
      const Once<ReadWrite<State>> max_exp_avg_sq{{work.at<State>(row.max_exp_avg_sq) + begin}};
      run(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
    }
    if (tracked) {
      Record* record = begin + count == work.count ? &args.records[work.chunk()] : nullptr;
      note_updates<T>(begin / piece, count, scalars.alpha, scalars.step, record);
    }
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
  __shared__ double sums[kNorms ? kSums + 1 : 1];
  __shared__ int32_t top;
  if (args.skip()) return;
  Pending pending{args, sums, top};
  if (threadIdx.x == 0) top = -1;
  for_each_chunk(args, [&](const int32_t& index) {
    const Work work(args, index);
    if constexpr (kNorms) {
      for (int i = threadIdx.x; i <= kSums; i += kThreads) sums[i] = 0;
      __syncthreads();
    }
    with_dtypes(work.row.param_dtype, work.row.state_dtype, [&](auto param, auto state) {
      update_chunk<Rule, typename decltype(param)::type, typename decltype(state)::type>(args, work,
                                                                                         sums);
    });
    if constexpr (kNorms) {
      pending.add(index);
    } else {
      note_params(args, work);
    }
  });
  if constexpr (kNorms) pending.shrink_all(true);
}

}  // namespace adamprox
