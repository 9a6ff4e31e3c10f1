// The part of DLPack's C exchange interface (major version 1) that reading a tensor needs. torch
// publishes it as torch.Tensor.__dlpack_c_exchange_api__, so this extension links no libtorch.
#pragma once

#include <cstdint>

namespace adamprox::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kROCm = 10 };
enum TypeCode : uint8_t { kFloat = 2, kBFloat = 4, kComplex = 5 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;  // of an older major version
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Fills `out` without ownership; -1 with a Python exception set where that cannot be done.
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace adamprox::dlpack
