// One step on an NVIDIA GPU: launches the kernel of fused_adam.cuh on the caller's stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "fused_adam.cuh"
#include "fused_adam.h"

namespace adamprox {
namespace {

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}
#define CHECK(call) check(call, #call)

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    CHECK(cudaGetDevice(&previous_));
    if (device != previous_) CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

// As many blocks as the device holds at once.
int resident_blocks(const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device}];
  if (blocks == 0) {
    int multiprocessors = 0, per_multiprocessor = 0;
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
    blocks = multiprocessors * per_multiprocessor;
  }
  return blocks;
}

void launch(void (*kernel)(LaunchArgs), LaunchArgs& args, const CudaStep& step) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const int64_t blocks = std::min<int64_t>(args.num_chunks, resident_blocks(function, step.device));
  void* arguments[] = {&args};
  CHECK(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                         0, static_cast<cudaStream_t>(step.stream)));
}

}  // namespace

void fused_adam_cuda(const TensorTable& table, const CudaStep& step) {
  if (table.chunks.empty()) return;
  const DeviceGuard guard(step.device);
  LaunchArgs args(step.metadata, static_cast<int64_t>(table.rows.size()),
                  static_cast<int64_t>(table.chunks.size()), step.payload);
  if (args.payload == nullptr) {
    const size_t grads = table.grads.size() * sizeof(void*);
    std::memcpy(args.inline_payload, table.grads.data(), grads);
    std::memcpy(args.inline_payload + grads, table.scalars.data(),
                table.scalars.size() * sizeof(Scalars));
  }
  with_rule(table.decay,
            [&](auto rule) { launch(update_kernel<typename decltype(rule)::type>, args, step); });
}

int64_t cuda_inline_payload() { return kInlinePayload; }

}  // namespace adamprox
