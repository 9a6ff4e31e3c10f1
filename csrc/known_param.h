// A param as the last step read it. Most are found as they were, and then need not be understood
// again; and what reading them will touch can be fetched ahead: it lies all over the heap.
#pragma once

#include <array>

#include "python_values.h"
#include "tensor_reader.h"
#include "tensor_table.h"

namespace adamprox {

struct KnownParam {
  enum Which { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kTensors };

  PyObject* owner = nullptr;  // null: not known
  bool amsgrad = false;
  dlpack::Device device{};
  TensorRow row{};  // but for the pointers, scalars, first_chunk and aligned
  std::array<SeenTensor, kTensors> tensors{};
  StateReader state_reader;

  // Only to be fetched, never read through: they may be gone.
  const void *state = nullptr, *state_keys = nullptr;
  std::array<const void*, kTensors> objects{};

  int size() const { return amsgrad ? kTensors : kMaxExpAvgSq; }

  void fetch() const {
    const auto lines = [](const void* place, int bytes) {
      for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(static_cast<const char*>(place) + i);
      }
    };
    lines(state, 64);
    if (!kDictsHaveVersions) lines(state_keys, 192);
    for (int i = 0; i < size(); ++i) {
      lines(objects[i], 64);
      lines(tensors[i].implementation, 192);
      for (const void* hint : tensors[i].hints) {
        if (hint != nullptr) lines(hint, 128);
      }
      lines(tensors[i].data, 64);
    }
  }
};

}  // namespace adamprox
