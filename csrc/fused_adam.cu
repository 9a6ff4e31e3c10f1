// One step on an NVIDIA GPU: launches the kernel of fused_adam.cuh on the caller's stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

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
int resident_blocks(const void* kernel, size_t shared, int device) {
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

template <typename... Args>
void launch(void (*kernel)(Args...), int64_t blocks, size_t shared, const CudaStep& step,
            Args&... args) {
  void* arguments[] = {&args...};
  CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(kThreads), arguments, shared,
                         static_cast<cudaStream_t>(step.stream)));
}

}  // namespace

void fused_adam_cuda(const TensorTable& table, const CudaStep& step) {
  if (table.chunks.empty()) return;
  const DeviceGuard guard(step.device);
  LaunchArgs args(table.decay, step.metadata, static_cast<int64_t>(table.rows.size()),
                  static_cast<int64_t>(table.chunks.size()), table.num_packed, step.payload,
                  step.prepared, table.records);
  if (args.payload == nullptr) {
    std::memcpy(args.inline_payload, step.inline_payload, step.inline_size);
  }
  Decay decay = table.decay;
  if (args.prepared != nullptr) launch(prepare_kernel, 1, 0, step, args, decay);
  with_rule(table.decay, [&](auto rule) {
    const auto kernel = update_kernel<typename decltype(rule)::type>;
    const size_t shared = args.records != nullptr ? sizeof(ChunkNotes) : 0;
    const int64_t resident =
        resident_blocks(reinterpret_cast<const void*>(kernel), shared, step.device);
    launch(kernel, std::min<int64_t>(args.num_tickets(), resident), shared, step, args);
  });
}

PayloadUploads::~PayloadUploads() { release(); }

// Waits for the kernels that read it; whatever fails, at the end of a process say, there is no help.
void PayloadUploads::release() {
  if (read_ != nullptr) cudaEventSynchronize(static_cast<cudaEvent_t>(read_));
  cudaFree(on_device_);
  for (int i = 0; i < kSlots; ++i) {
    cudaFreeHost(pinned_[i]);
    if (copied_[i] != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(copied_[i]));
    pinned_[i] = copied_[i] = nullptr;
  }
  if (read_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(read_));
  on_device_ = read_ = nullptr;
  capacity_ = 0;
  cudaGetLastError();
}

const void* PayloadUploads::upload(int device, void* stream, const void* payload, size_t size) {
  const DeviceGuard guard(device);
  const auto new_event = [](void*& event) {
    CHECK(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(&event), cudaEventDisableTiming));
  };
  if (size > capacity_) {
    release();
    CHECK(cudaMalloc(&on_device_, size));
    for (int i = 0; i < kSlots; ++i) {
      CHECK(cudaHostAlloc(&pinned_[i], size, cudaHostAllocDefault));
      new_event(copied_[i]);
    }
    new_event(read_);
    capacity_ = size;
  } else if (stream != stream_) {
    CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(read_)));
  }
  stream_ = stream;
  slot_ = (slot_ + 1) % kSlots;
  const auto copied = static_cast<cudaEvent_t>(copied_[slot_]);
  CHECK(cudaEventSynchronize(copied));
  std::memcpy(pinned_[slot_], payload, size);
  const auto on = static_cast<cudaStream_t>(stream);
  CHECK(cudaMemcpyAsync(on_device_, pinned_[slot_], size, cudaMemcpyHostToDevice, on));
  CHECK(cudaEventRecord(copied, on));
  return on_device_;
}

void PayloadUploads::launched(void* stream) {
  CHECK(cudaEventRecord(static_cast<cudaEvent_t>(read_), static_cast<cudaStream_t>(stream)));
}

bool cuda_captures(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess) {
    return status != cudaStreamCaptureStatusNone;
  }
  cudaGetLastError();  // another stream's capture forbids it
  return true;
}

int64_t cuda_inline_payload() { return kInlinePayload; }

}  // namespace adamprox
