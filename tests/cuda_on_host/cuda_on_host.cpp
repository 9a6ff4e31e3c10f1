// One step by the CUDA kernels, run on the CPU; called through ctypes by tests/cuda_on_host.
#include "cuda_on_host.h"

#include <cstring>
#include <string>

#include "fused_adam.cuh"

using namespace adamprox;

// Few blocks, so that each takes several chunks, as a GPU's do when there are many.
constexpr unsigned kBlocks = 3;

extern "C" const char* step(int decay, const void* metadata, int64_t num_rows, int64_t num_chunks,
                            const void* payload, int64_t payload_bytes, double* chunk_sums,
                            int* launches) {
  static std::string error;
  LaunchArgs args{};
  args.rows = static_cast<const TensorRow*>(metadata);
  args.num_rows = num_rows;
  args.chunks = reinterpret_cast<const Chunk*>(args.rows + num_rows);
  args.num_chunks = num_chunks;
  args.chunk_sums = chunk_sums;
  if (payload_bytes <= kInlinePayload) {
    std::memcpy(args.inline_payload, payload, payload_bytes);
  } else {
    args.payload = static_cast<const unsigned char*>(payload);
  }
  const auto launch = [&](void (*kernel)(LaunchArgs)) {
    cuda_on_host::launch(kBlocks, kThreads, [&] { kernel(args); });
    ++*launches;
  };
  try {
    with_rule(static_cast<Decay>(decay),
              [&](auto rule) { launch(update_kernel<typename decltype(rule)::type>); });
    if (static_cast<Decay>(decay) == Decay::kProxL2) launch(shrink_kernel);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
