// One step on an NVIDIA GPU: launches the kernels of kernel.cuh on the caller's stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernel.cuh"
#include "step.h"

namespace adamprox {
namespace {

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}
#define CHECK(call) check(call, #call)

// As many blocks as the device holds at once.
int64_t resident_blocks(const void* kernel, size_t shared, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, size_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, shared, device}];
  if (blocks == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads,
                                                        shared));
    blocks = multiprocessors * per_multiprocessor;
  }
  return blocks;
}

}  // namespace

void step_on_cuda(const TensorTable& table, const CudaStep& step) {
  const auto num_chunks = static_cast<int64_t>(table.chunks.size());
  LaunchArgs args(step.metadata, static_cast<int64_t>(table.rows.size()), num_chunks,
                  table.num_slots, step.payload, step.prepared, table.records);
  if (step.payload == nullptr) {
    std::memcpy(args.inline_payload, step.inline_payload, step.inline_size);
  }
  using Kernel = void (*)(LaunchArgs);
  const size_t shared = args.records != nullptr ? sizeof(ChunkNotes) : 0;
  const auto resident = [&](Kernel kernel) {
    return resident_blocks(reinterpret_cast<const void*>(kernel), shared, step.device);
  };
  const auto load = [&](Kernel kernel, LaunchArgs&, int64_t) { resident(kernel); };
  const auto launch = [&](Kernel kernel, LaunchArgs& args, int64_t blocks) {
    const dim3 grid(static_cast<unsigned>(std::min(blocks, resident(kernel))));
    void* arguments[] = {&args};
    CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), arguments,
                           shared, static_cast<cudaStream_t>(step.stream)));
  };
  const auto for_each = [&](auto f) {
    for_each_launch(args, static_cast<int64_t>(table.scalars_recipes.size()), num_chunks,
                    table.num_packed, table.num_of_blocks, f);
  };
  for_each(load);  // all kernels, before the first one writes
  for_each(launch);
}

std::string cuda_device_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, prepare_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // which no later call shall tell
  return cudaGetErrorString(status);
}

int64_t cuda_inline_payload() { return kInlinePayload; }

}  // namespace adamprox
