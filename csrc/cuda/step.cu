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

size_t shared_bytes(const LaunchArgs& args) {
  return args.records != nullptr ? sizeof(ChunkNotes) : 0;
}

using Kernel = void (*)(LaunchArgs);

// As many blocks as the device holds at once. It loads the kernel, the first time.
int64_t resident_blocks(Kernel kernel, const LaunchArgs& args, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, size_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, shared_bytes(args), device}];
  if (blocks == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads,
                                                        shared_bytes(args)));
    blocks = multiprocessors * per_multiprocessor;
  }
  return blocks;
}

// Calls f(kernel, args, blocks) for each launch of a step.
template <typename F>
void for_each_launch_of(const TensorTable& table, LaunchArgs& args, F f) {
  for_each_launch(args, static_cast<int64_t>(table.scalars_recipes.size()),
                  static_cast<int64_t>(table.chunks.size()), table.num_packed, table.num_of_blocks,
                  f);
}

}  // namespace

void load_on_cuda(const TensorTable& table, int device) {
  LaunchArgs args(nullptr, 0, 0, 0, nullptr, nullptr, table.records);
  for_each_launch_of(table, args, [&](Kernel kernel, LaunchArgs& args, int64_t) {
    resident_blocks(kernel, args, device);
  });
}

void step_on_cuda(const TensorTable& table, const CudaStep& step) {
  const auto num_chunks = static_cast<int64_t>(table.chunks.size());
  LaunchArgs args(step.metadata, static_cast<int64_t>(table.rows.size()), num_chunks,
                  table.num_slots, step.payload, step.prepared, table.records);
  if (step.payload == nullptr) {
    std::memcpy(args.inline_payload, step.inline_payload, step.inline_size);
  }
  for_each_launch_of(table, args, [&](Kernel kernel, LaunchArgs& args, int64_t blocks) {
    const int64_t most = resident_blocks(kernel, args, step.device);
    const dim3 grid(static_cast<unsigned>(std::min(blocks, most)));
    void* arguments[] = {&args};
    CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), arguments,
                           shared_bytes(args), static_cast<cudaStream_t>(step.stream)));
    step.launched = true;
  });
}

std::string cuda_device_problem() {
  int driver = 0;
  const bool known = cudaDriverGetVersion(&driver) == cudaSuccess;
  if (known && kParameters > 4096 && driver < 12010) {
    return "its driver is older than R530 (CUDA 12.1), and takes no kernels with so many "
           "parameters";
  }
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, prepare_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // which no later call shall tell
  return cudaGetErrorString(status);
}

int64_t cuda_inline_payload() { return kInlinePayload; }

}  // namespace adamprox
