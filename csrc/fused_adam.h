// The backends' entry points: each makes one step over every row of a table.
#pragma once

#include <cstddef>

#include "tensor_table.h"

namespace adamprox {

void fused_adam_cpu(const TensorTable& table, int threads);

// What fused_adam_cpu runs with here: "AVX-512", "AVX2" or "baseline".
const char* cpu_instruction_set();

struct CudaStep {
  int device;
  void* stream;
  void* metadata;       // on the device: TensorRow[], Chunk[] and the Workspace
  const void* payload;  // on the device; null where it fits inline:
  const void* inline_payload;
  size_t inline_size;
  void* prepared;  // on the device, for what the recipes become; null without them
};

void fused_adam_cuda(const TensorTable& table, const CudaStep& step);

// Where payloads that are too long to be passed inline are put, step after step. Nothing waits, but for
// the copy of the step before the last one, and on another stream for the kernel of the last one.
class PayloadUploads {
 public:
  ~PayloadUploads();
  const void* upload(int device, void* stream, const void* payload, size_t size);
  void launched(void* stream);  // the kernel that reads it

 private:
  static constexpr int kSlots = 2;
  void release();
  size_t capacity_ = 0;
  void* on_device_ = nullptr;
  void* pinned_[kSlots] = {};
  void* copied_[kSlots] = {};
  void* read_ = nullptr;
  void* stream_ = nullptr;
  int slot_ = 0;
};

// Whether what is launched on the stream is captured into a CUDA graph, or may not be launched now.
bool cuda_captures(void* stream);

// The bytes of payload that ride in the kernel's parameters.
int64_t cuda_inline_payload();

}  // namespace adamprox
