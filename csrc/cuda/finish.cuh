// What else is to be done with a chunk whose params are final, in the sweep that has made them so.
#pragma once

#include "telemetry.cuh"

namespace adamprox {

// All threads of the team that has written the params call it. Kernels have it several times: its
// parts are functions that are not inlined, and that call no others, since that would need a stack.
template <typename Team>
__device__ __forceinline__ void finish_chunk(Team /*team*/, const LaunchArgs& args,
                                             const ChunkSpan& chunk) {
  if (args.records != nullptr) note_params(args, chunk);  // the team is a block then
}

}  // namespace adamprox
