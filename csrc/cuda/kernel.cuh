// The CUDA kernels. One updates all tensors of elementwise rules, one those of AdamProxL2, whatever
// their groups, rules and dtypes.
#pragma once

#include "../math/recipes.h"
#include "second_sweep.cuh"

namespace adamprox {

constexpr int kBlocksPerMultiprocessor = 2;  // the budget: 128 registers a thread, no spills

// Updates elements, and sums the squares of the params as they are stored. A thread sums its vector,
// and a warp the vectors of its threads, which are neighbours. The warp's sum goes to the place in
// `sums` of its first kWarp elements. There is a place for each kWarp elements; the others keep their
// zeros, which change no sum of squares.
template <typename Param, typename Update>
struct UpdateAndSum {
  static constexpr bool kSumsByWarps = true;
  const Update update;
  double* sums;
  double* rest;            // the sum of the elements that fill no vector
  WaitingSums<4> waiting;  // in registers: every index is known to the compiler

  template <typename T, typename... Others>
  __device__ __forceinline__ void operator()(int i, T& param, Others&... others) {
    update(param, others...);
    waiting.add(i, square(Convert<Param>::widen(Convert<Param>::narrow(param))));
  }

  // The vectors of a warp begin at element `first`, and the thread's own at `at`. If that is past the
  // end, the thread has no vector; at the very end the rest begins, if there is one.
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

  // The rest begins at element `first`, and has been summed, before the vectors. If that is amid a
  // warp's vectors, it is a part of that warp's sum: `finish` adds it.
  template <int kWidth>
  __device__ __forceinline__ void finish_rest(int first) {
    if (threadIdx.x == 0 && first % (kWarp * kWidth) != 0) {
      *rest = sums[first / kWarp];
      sums[first / kWarp] = 0;
    }
    __syncthreads();
  }
};

template <typename Rule, typename Team>
__device__ __forceinline__ void update_span(Team team, const LaunchArgs& args,
                                            const ChunkSpan& span, double* sums, double* rest) {
  const TensorRow& row = span.row;
  with_dtypes(row.param_dtype, row.state_dtype, [&](auto param_type, auto state_type) {
    using Param = typename decltype(param_type)::type;
    using State = typename decltype(state_type)::type;
    const Update<Rule, Compute<Param>> update(args.scalars_of(row));
    const ReadWrite<Param> param{span.at<Param>(row.param)};
    const Streaming<Read<Param>> grad{{span.at<Param>(args.grads()[span.row_index])}};
    const auto state = [&](StateName name) { return span.at<State>(row.states[name]); };
    const Streaming<ReadWrite<State>> exp_avg{{state(kExpAvg)}}, exp_avg_sq{{state(kExpAvgSq)}};
    // One loop with and without amsgrad: a second one would be half as much code again. Without, the
    // stream is never touched, but lies in global memory like any other.
    const bool amsgrad = row.states[kMaxExpAvgSq] != nullptr;
    const Optional<Streaming<ReadWrite<State>>> max_exp_avg_sq{
        {{state(amsgrad ? kMaxExpAvgSq : kExpAvgSq)}}, amsgrad};
    const auto run = [&](const auto& f) {
      for_each_element(team, span.count, span.aligned(), f, param, grad, exp_avg, exp_avg_sq,
                       max_exp_avg_sq);
    };
    if constexpr (std::is_same_v<Rule, ProxL2>) {
      run(UpdateAndSum<Param, Update<Rule, Compute<Param>>>{update, sums, rest, {}});
    } else {
      run(PerElement{[&](int, auto&... elements) { update(elements...); }});
    }
  });
}

// Not inlined: each rule has the registers to itself. The loops of all rules in one function spilled.
template <typename Rule>
__device__ __noinline__ void update_piece(Team team, const LaunchArgs& args, int32_t index,
                                          int first, int most) {
  update_span<Rule>(team, args, ChunkSpan(args, index).piece(first, most), nullptr, nullptr);
}

template <bool kBlocks, typename Team>
__device__ __forceinline__ void update_chunk(Team team, const LaunchArgs& args,
                                             const int32_t& index, double* sums) {
  const ChunkSpan chunk(args, index);
  if constexpr (kBlocks) {
    for (int i = threadIdx.x; i <= kSums; i += kThreads) sums[i] = 0;
    __syncthreads();
  }
  const int most = args.records != nullptr ? kPiece : static_cast<int>(kChunkSize);
  for (int first = 0; first < chunk.count; first += most) {
    const ChunkSpan piece = chunk.piece(first, most);
    if constexpr (kBlocks) {
      update_span<ProxL2>(team, args, piece, sums + first / kWarp, sums + kSums);
    } else {
      with_rule(chunk.row.rule, [&](auto type) {
        using Rule = typename decltype(type)::type;
        if constexpr (!std::is_same_v<Rule, ProxL2>)
          update_piece<Rule>(team, args, index, first, most);
      });
    }
    const bool last = first + piece.count == chunk.count;
    if (args.records != nullptr) note_updates(args, piece, first, last);
  }
}

// Before the update, where the payload has recipes.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ LaunchArgs args) {
  prepare(args.recipes(), *args.prepared, blockIdx.x * kThreads + threadIdx.x,
          gridDim.x * kThreads);
}

template <bool kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ LaunchArgs args) {
  __shared__ double sums[kBlocks ? kSums + 1 : 1];
  __shared__ int32_t top;
  if (args.skip()) return;
  SecondSweep second_sweep{args, sums, top};
  if (threadIdx.x == 0) top = -1;
  using Teams = std::conditional_t<kBlocks, Block, Team>;
  for_each_chunk<Teams>(args, [&](auto team, const int32_t& index) {
    update_chunk<kBlocks>(team, args, index, sums);
    if constexpr (kBlocks) {
      second_sweep.add(index);
    } else {
      finish_chunk(team, args, ChunkSpan(args, index));
    }
  });
  if constexpr (kBlocks) second_sweep.shrink_all(true);
}

// A step's launches: calls launch(kernel, args, blocks), `blocks` being the most that have work.
template <typename Launch>
void for_each_launch(LaunchArgs& args, int64_t num_recipes, int64_t num_chunks, int64_t num_packed,
                     int64_t num_of_blocks, Launch launch) {
  if (num_recipes > 0) launch(prepare_kernel, args, (num_recipes + kThreads - 1) / kThreads);
  args.num_chunks = static_cast<int32_t>(num_chunks - num_of_blocks);
  args.num_packed = args.records != nullptr ? 0 : static_cast<int32_t>(num_packed);
  if (args.num_chunks > 0) launch(update_kernel<false>, args, args.num_tickets());
  args.first_chunk = args.num_chunks;
  args.num_chunks = static_cast<int32_t>(num_of_blocks);
  args.num_packed = 0;
  if (args.num_chunks > 0) launch(update_kernel<true>, args, num_of_blocks);
}

}  // namespace adamprox
