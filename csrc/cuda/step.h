// One step on an NVIDIA GPU, over every row of a table.
#pragma once

#include <cstddef>
#include <string>

#include "../table.h"

namespace adamprox {

struct CudaStep {
  int device;  // the current one
  void* stream;
  void* metadata;       // on the device: TensorRow[], Chunk[] and the Workspace
  const void* payload;  // on the device; null where it fits inline:
  const void* inline_payload;
  size_t inline_size;
  void* prepared;  // on the device, for what the recipes become; null without them
  bool& launched;  // set once the first kernel is: the step can no longer be undone
};

// Loads the kernels of a step on the current device, so that no launch fails by that.
void load_on_cuda(const TensorTable& table, int device);

void step_on_cuda(const TensorTable& table, const CudaStep& step);

// Why the current device, or its driver, cannot run these kernels; empty if they can.
std::string cuda_device_problem();

// The bytes of payload that ride in the kernel's parameters.
int64_t cuda_inline_payload();

}  // namespace adamprox
