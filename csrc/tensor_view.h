// How a tensor lies in memory.
#pragma once

#include <cstdint>

#include "math/dispatch.h"

namespace adamprox {

struct Device {
  bool gpu = false;
  int id = 0;
  bool operator==(const Device& o) const { return gpu == o.gpu && id == o.id; }
};

struct TensorView {
  char* data;
  int64_t *sizes, *strides;
  int64_t dim;
  DType dtype;  // of its real numbers
  bool complex;
  Device device;

  int64_t numel() const {
    int64_t product = 1;
    for (int i = 0; i < dim; ++i) product *= sizes[i];
    return product;
  }

  // With the same shape, strides and device.
  bool lies_as(const TensorView& other) const {
    if (dim != other.dim || complex != other.complex || !(device == other.device)) return false;
    for (int i = 0; i < dim; ++i) {
      if (sizes[i] != other.sizes[i]) return false;
      if (sizes[i] != 1 && strides[i] != other.strides[i]) return false;
    }
    return true;
  }

  // Whether it fills one piece of memory without gaps, in any order of dims.
  bool is_dense() const {
    const int64_t all = numel();
    for (int64_t filled = 1; filled < all;) {
      int64_t next = dim - 1;  // the dim that repeats what is filled
      while (next >= 0 && (sizes[next] == 1 || strides[next] != filled)) --next;
      if (next < 0) return false;
      filled *= sizes[next];
    }
    return true;
  }

  // Whether all elements lie within `bytes` from where the storage begins; `offset` in elements.
  bool fits(int64_t offset, int64_t bytes) const {
    int64_t last = offset;
    for (int i = 0; i < dim; ++i) {
      if (sizes[i] == 0) return true;
      last += (sizes[i] - 1) * strides[i];
    }
    return data != nullptr && (last + 1) * (size_of(dtype) << complex) <= bytes;
  }
};

}  // namespace adamprox
