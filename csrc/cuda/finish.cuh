// What else is to be done with a chunk whose params are final, in the sweep that has made them so.
#pragma once

#include "telemetry.cuh"

namespace adamprox {

// ema <- ema + (1 - ema_decay) * (param - ema). Each thread reads the params that it has written.
template <typename Team>
__device__ __noinline__ void average(Team team, void* params, void* ema, DType dtype, int count,
                                     bool aligned, double one_minus_ema) {
  with_dtype(dtype, [&](auto type) {
    using Param = typename decltype(type)::type;
    using T = Compute<Param>;
    const T k = static_cast<T>(one_minus_ema);
    for_each_element(
        team, count, aligned, PerElement{[&](int, T& param, T& e) { update_moment(e, param, k); }},
        Read<Param>{known_global<Param>(params)}, Streaming<ReadWrite<T>>{{known_global<T>(ema)}});
  });
}

// All threads of the team that has written the params call it. Kernels have it several times: its
// parts are functions that are not inlined, and that call no others, since that would need a stack.
template <typename Team>
__device__ __forceinline__ void finish_chunk(Team team, const LaunchArgs& args,
                                             const ChunkSpan& chunk) {
  const TensorRow& row = chunk.row;
  if (row.states[kEma] != nullptr) {
    average(team, chunk.at(row.param, row.param_dtype),
            chunk.at(row.states[kEma], compute_type(row.param_dtype)), row.param_dtype, chunk.count,
            chunk.aligned(), args.scalars_of(row).one_minus_ema);
  }
  if (args.records != nullptr) note_params(args, chunk);  // the team is a block then
}

}  // namespace adamprox
