// How a tensor lies in memory, from what DLPack says of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "tensor_table.h"

namespace adamprox {

inline int64_t numel(const dlpack::Tensor& t) {
  int64_t product = 1;
  for (int i = 0; i < t.ndim; ++i) product *= t.shape[i];
  return product;
}

inline bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    if (a.shape[i] != 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

// Whether the elements fill one piece of memory without gaps or overlaps, in any order of dims.
inline bool is_dense(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (t.strides[i] != expected) {
      expected = -1;
      break;
    }
    expected *= t.shape[i];
  }
  if (expected >= 0) return true;  // row-major
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return true;
    if (t.shape[i] != 1) dims.emplace_back(t.strides[i], t.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The real type of a tensor's numbers.
inline DType real_dtype(const dlpack::DataType& t) {
  if (t.code == dlpack::kBFloat) return DType::kBFloat16;
  const int bits = t.code == dlpack::kComplex ? t.bits / 2 : t.bits;
  return bits == 64 ? DType::kFloat64 : bits == 32 ? DType::kFloat32 : DType::kFloat16;
}

constexpr dlpack::DataType kFloat32{dlpack::kFloat, 32, 1};

inline bool operator==(const dlpack::DataType& a, const dlpack::DataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline bool same_device(const dlpack::Device& a, const dlpack::Device& b) {
  return a.type == b.type && a.id == b.id;
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace adamprox
